//! A compressed archive that only its owner can read. Everything that goes in has secrets replaced.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context as _, anyhow};
use flate2::{Compression, write::GzEncoder};
use serde::Serialize;
use tar::{Builder, EntryType, Header};

use super::redact;
use crate::cli::output;

/// Longest part, in bytes. Parts are bounded where they come from; this is for those that turn out larger all the same.
const LONGEST: usize = 16 * 1024 * 1024;

/// Behind the name of a part that could not be had.
pub(super) const ERROR: &str = ".error.txt";

/// A file in the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Part {
    /// Its name, without the archive's directory.
    pub(super) name: String,
    /// Its size in bytes.
    pub(super) size: usize,
    /// Why it is not there; the file says the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    /// Whether its end is missing because it was too long.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) cut: bool,
}

/// An archive that is being written. Dropped before it is finished, it is removed.
pub(super) struct Archive {
    path: PathBuf,
    /// Directory in the archive.
    name: String,
    builder: Option<Builder<GzEncoder<BufWriter<File>>>>,
    parts: Vec<Part>,
    time: u64,
}

impl Archive {
    /// Makes the file, which must not exist: what is there may be somebody else's.
    pub(super) fn create(path: &Path, name: &str) -> anyhow::Result<Self> {
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| match e.kind() {
                io::ErrorKind::AlreadyExists => anyhow!("{} exists already; name another --file", path.display()),
                _ => anyhow::Error::from(e).context(format!("creating {}; name another --file", path.display())),
            })?;
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let encoder = GzEncoder::new(BufWriter::new(file), Compression::default());
        Ok(Self {
            path: path.to_owned(),
            name: name.to_owned(),
            builder: Some(Builder::new(encoder)),
            parts: Vec::new(),
            time,
        })
    }

    /// Adds a value as JSON, or why it is not there.
    pub(super) fn json<T: Serialize>(&mut self, name: &str, value: anyhow::Result<T>) -> anyhow::Result<()> {
        self.text(name, value.and_then(|value| output::json(&value)))
    }

    /// Adds a text, or why it is not there.
    pub(super) fn text(&mut self, name: &str, text: anyhow::Result<String>) -> anyhow::Result<()> {
        let (name, text, error) = match text {
            Ok(text) => (name.to_owned(), text, None),
            Err(e) => {
                let error = redact::text(&format!("{e:#}"));
                (format!("{name}{ERROR}"), format!("{error}\n"), Some(error))
            }
        };
        let mut text = redact::text(&text);
        let cut = text.len() > LONGEST;
        if cut {
            text.truncate(text.floor_char_boundary(LONGEST));
        }
        self.append(&name, text.as_bytes())?;
        self.parts.push(Part { name, size: text.len(), error, cut });
        Ok(())
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        header.set_size(bytes.len() as u64);
        let builder = self.builder.as_mut().context("the archive is finished")?;
        builder
            .append_data(&mut header, format!("{}/{name}", self.name), bytes)
            .with_context(|| format!("writing {}", self.path.display()))
    }

    /// Adds the list of parts and writes everything to disk. Returns the parts and the size of the archive.
    pub(super) fn finish(mut self) -> anyhow::Result<(Vec<Part>, u64)> {
        let manifest = output::json(&self.parts)?;
        self.append("manifest.json", manifest.as_bytes())?;
        let failed = || format!("writing {}", self.path.display());
        let builder = self.builder.take().context("the archive is finished")?;
        let written = (|| -> io::Result<u64> {
            let mut file = builder.into_inner()?.finish()?;
            file.flush()?;
            file.get_ref().sync_all()?;
            Ok(file.get_ref().metadata()?.len())
        })();
        if written.is_err() {
            self.remove();
        }
        Ok((std::mem::take(&mut self.parts), written.with_context(failed)?))
    }

    /// Best effort: half an archive is of no use to anybody.
    fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        if self.builder.is_some() {
            self.remove();
        }
    }
}
