mod handshakes;
mod kernel_end;
mod ktls;
mod native;
mod openssl;
mod records;
mod refusals;
mod support;
