//! Alert numbers used on the tunnel (RFC 8446, section 6).
