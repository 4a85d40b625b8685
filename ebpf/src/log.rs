//! `aya-log` lines, compiled only with feature `log`: their map has a definition that libbpf does not load.

/// Logs a line with `aya_log_ebpf::debug!`.
macro_rules! debug {
    ($ctx:expr, $($argument:tt)*) => {
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!($ctx, $($argument)*);
    };
}

/// Logs a line with `aya_log_ebpf::info!`.
macro_rules! info {
    ($ctx:expr, $($argument:tt)*) => {
        #[cfg(feature = "log")]
        aya_log_ebpf::info!($ctx, $($argument)*);
    };
}

pub(crate) use {debug, info};
