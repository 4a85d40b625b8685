//! The C library's heap.

/// Gives the kernel back the pages of the heap in which nothing is allocated, also those between others. Takes the heap's locks for
/// as long as it takes, some milliseconds for 100 MB. Other C libraries than glibc do it by themselves.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim may be called at any time from any thread; it touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}
