mod handshakes;
mod native;
mod openssl;
mod records;
mod refusals;
mod support;
