mod handshakes;
mod ktls;
mod native;
mod openssl;
mod records;
mod refusals;
mod support;
