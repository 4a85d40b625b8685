//! Options for bpf-linker.

fn main() {
    // With its default, LLVM calls a memset of this object instead of writing a few zeroes in place, and libbpf verifies such
    // a global function apart from its callers, which cannot succeed. Without the built-ins a call that is left fails the build.
    println!("cargo:rustc-link-arg-bins=--disable-expand-memcpy-in-order");
    println!("cargo:rustc-link-arg-bins=--disable-memory-builtins");
    println!("cargo:rerun-if-changed=build.rs");
}
