//! An initramfs: an archive in cpio's "newc" format, as the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`
//! describes it. Several may follow one another.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use cpio::newc::{self, Builder};

/// Kinds of files (`S_IFMT` of `inode(7)`).
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// What the machine's file system begins with, by absolute path.
pub(super) struct Archive {
    entries: BTreeMap<PathBuf, Entry>,
}

enum Entry {
    Directory { mode: u32 },
    Link(PathBuf),
    Text(Vec<u8>),
    Copy { of: PathBuf },
}

impl Archive {
    pub(super) fn new() -> Self {
        Self { entries: BTreeMap::new() }
    }

    pub(super) fn directory(&mut self, path: impl AsRef<Path>, mode: u32) {
        self.parents(path.as_ref());
        self.entries.insert(path.as_ref().to_path_buf(), Entry::Directory { mode });
    }

    pub(super) fn link(&mut self, path: impl AsRef<Path>, to: impl AsRef<Path>) {
        self.parents(path.as_ref());
        self.entries.insert(path.as_ref().to_path_buf(), Entry::Link(to.as_ref().to_path_buf()));
    }

    pub(super) fn text(&mut self, path: impl AsRef<Path>, text: impl Into<Vec<u8>>) {
        self.parents(path.as_ref());
        self.entries.insert(path.as_ref().to_path_buf(), Entry::Text(text.into()));
    }

    /// The file `of` of this machine at another path; its directories must not be links here.
    pub(super) fn copy(&mut self, path: impl AsRef<Path>, of: impl AsRef<Path>) {
        self.parents(path.as_ref());
        self.entries.insert(path.as_ref().to_path_buf(), Entry::Copy { of: of.as_ref().to_path_buf() });
    }

    /// A file or an empty directory of this machine at the same path, with the symbolic links on the way to it. The file that it
    /// is in the end.
    pub(super) fn same(&mut self, path: &Path) -> Result<PathBuf> {
        /// As many as the kernel follows.
        const MOST_LINKS: usize = 40;
        let mut path = path.to_path_buf();
        for _ in 0..MOST_LINKS {
            let Some((link, to)) = first_link(&path)? else {
                let metadata = fs::metadata(&path).with_context(|| format!("looking at {}", path.display()))?;
                if metadata.is_dir() {
                    self.directory(&path, metadata.mode() & 0o7777);
                } else {
                    self.copy(&path, &path);
                }
                return Ok(path);
            };
            self.link(&link, &to);
            let rest = path.strip_prefix(&link).expect("it begins with the link");
            let parent = link.parent().context("the root is no link")?;
            path = normal(&parent.join(to).join(rest));
        }
        bail!("{} goes through more than {MOST_LINKS} symbolic links", path.display())
    }

    /// Everything below a directory of this machine, at another path.
    pub(super) fn tree(&mut self, of: &Path, path: &Path) -> Result<()> {
        for entry in fs::read_dir(of).with_context(|| format!("listing {}", of.display()))? {
            let entry = entry.with_context(|| format!("listing {}", of.display()))?;
            let path = path.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                self.tree(&entry.path(), &path)?;
            } else {
                self.copy(path, entry.path());
            }
        }
        Ok(())
    }

    /// Writes it to a file.
    pub(super) fn write(&self, to: &Path) -> Result<()> {
        let file = File::create(to).with_context(|| format!("creating {}", to.display()))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        for (path, entry) in &self.entries {
            out = write_entry(out, path, entry).with_context(|| format!("archiving {}", path.display()))?;
        }
        newc::trailer(out)?.flush().with_context(|| format!("writing {}", to.display()))
    }

    fn parents(&mut self, path: &Path) {
        for parent in path.ancestors().skip(1).filter(|parent| parent.parent().is_some()) {
            self.entries.entry(parent.to_path_buf()).or_insert(Entry::Directory { mode: 0o755 });
        }
    }
}

fn write_entry<W: Write>(out: W, path: &Path, entry: &Entry) -> Result<W> {
    // The kernel's archives have relative names.
    let name = path.strip_prefix("/").context("paths are absolute")?.to_str().context("the path is not UTF-8")?;
    let builder = Builder::new(name);
    let (builder, content): (_, Box<dyn io::Read>) = match entry {
        Entry::Directory { mode } => (builder.mode(DIRECTORY | mode), Box::new(io::empty())),
        Entry::Link(to) => (builder.mode(LINK | 0o777), Box::new(io::Cursor::new(to.to_str().context("not UTF-8")?))),
        Entry::Text(text) => (builder.mode(FILE | 0o644), Box::new(io::Cursor::new(text))),
        Entry::Copy { of } => {
            let file = File::open(of).with_context(|| format!("opening {}", of.display()))?;
            let metadata = file.metadata()?;
            // Python compares the time of a source with what its compiled form says.
            let time = u32::try_from(metadata.mtime()).unwrap_or_default();
            (builder.mode(FILE | metadata.mode() & 0o7777).mtime(time), Box::new(file))
        }
    };
    let size = match entry {
        Entry::Directory { .. } => 0,
        Entry::Link(to) => to.as_os_str().len() as u64,
        Entry::Text(text) => text.len() as u64,
        Entry::Copy { of } => fs::metadata(of)?.len(),
    };
    let size = u32::try_from(size).context("files of 4 GiB and more do not fit")?;
    let mut writer = builder.write(out, size);
    io::copy(&mut io::Read::take(content, u64::from(size)), &mut writer)?;
    Ok(writer.finish()?)
}

/// The first symbolic link on the way along `path`, itself included, and where it points to.
fn first_link(path: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    let mut prefix = PathBuf::new();
    for component in path.components() {
        prefix.push(component);
        if fs::symlink_metadata(&prefix).with_context(|| format!("looking at {}", prefix.display()))?.is_symlink() {
            let to = fs::read_link(&prefix).with_context(|| format!("reading the link {}", prefix.display()))?;
            return Ok(Some((prefix, to)));
        }
    }
    Ok(None)
}

/// Without `.` and `..`; correct where everything before a `..` is no link.
fn normal(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(result.pop()),
            Component::CurDir => {}
            other => result.push(other),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::{Archive, Entry};

    #[test]
    fn files_come_with_the_links_on_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("usr/bin")).unwrap();
        std::fs::write(root.join("usr/bin/dash"), "program").unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
        symlink("../bin/dash", root.join("usr/bin/sh")).unwrap();
        let mut archive = Archive::new();
        assert_eq!(archive.same(&root.join("bin/sh")).unwrap(), root.join("usr/bin/dash"));
        assert!(matches!(&archive.entries[&root.join("bin")], Entry::Link(to) if to.as_os_str() == "usr/bin"));
        assert!(
            matches!(&archive.entries[&root.join("usr/bin/sh")], Entry::Link(to) if to.as_os_str() == "../bin/dash")
        );
        assert!(matches!(archive.entries[&root.join("usr/bin")], Entry::Directory { mode: 0o755 }));

        archive.text("/etc/hosts", "127.0.0.1 localhost\n");
        let file = root.join("initramfs");
        archive.write(&file).unwrap();
        let written = std::fs::read(&file).unwrap();
        assert!(written.starts_with(b"070701"), "newc");
        let content = String::from_utf8_lossy(&written).into_owned();
        assert!(content.contains("program") && content.contains("etc/hosts\0") && content.contains("TRAILER!!!"));
    }
}
