//! Sets up `tracing`: text or JSON on standard error, filter from `--log` or `RUST_LOG`.
