//! Underpass' BPF programs: cgroup socket hooks capture what a pod sends, tc classifiers guarantee it.
//!
//! One file per hook: [`connect`] rewrites destinations, [`sockops`] tells the agent what they were, [`names`] hides the
//! rewriting from the application, [`guard`] stops what escaped capture, [`inbound`] decides about plaintext arriving,
//! [`probe`] recognises what the kubelet sends, [`reset`] answers what is refused.
//! [`pending`] keeps one pod's connections from taking the room of the others'.
//! Helpers are those of Linux 6.1; user space finds programs and maps by the names in `underpass_abi`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)] // adding atomically: core has no such operation for this target

mod connect;
mod decide;
mod events;
mod guard;
mod inbound;
mod log;
mod maps;
mod names;
mod parse;
mod pending;
mod probe;
mod reset;
mod socket;
mod sockops;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The programs are Apache-2.0 as everything here, but the kernel offers some of the helpers they call only to programs
/// that declare a licence compatible with its own, from a fixed list that this string is in.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
