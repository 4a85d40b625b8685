//! stub
/// stub
pub fn set_bind_address_no_port(_: &socket2::Socket) -> std::io::Result<()> { todo!() }
