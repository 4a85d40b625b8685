//! The BPF object, compiled by the build script and embedded.

/// The object as both aya and libbpf load it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/underpass-bpf"));

/// The same programs with `aya-log` lines, for aya only.
pub static OBJECT_WITH_LOG: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/underpass-bpf-log"));

/// 16 hexadecimal digits that change whenever a shared type or a map definition does; part of the pin path,
/// so that an agent never adopts maps it would misread.
pub const ABI_HASH: &str = env!("UNDERPASS_ABI_HASH");
