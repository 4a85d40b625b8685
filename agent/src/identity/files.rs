//! Certificates, keys and roots from PEM files, reloaded when they change.

/// Reads PEM files; see [`crate::mesh::CertificateFiles`].
pub struct FilesIssuer {}
