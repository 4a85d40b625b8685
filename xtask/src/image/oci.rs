//! Images in the layout of the Open Container Initiative (image-spec 1.0), as one tar file with one layer.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

/// What the file system of a container is made of. The same files make the same layer.
pub(crate) struct Layer {
    archive: Builder<Vec<u8>>,
    directories: BTreeSet<PathBuf>,
}

/// An image with one layer.
pub(crate) struct Image<'a> {
    /// With a tag: `localhost/underpass:0.1.0`.
    pub(crate) name: &'a str,
    pub(crate) entrypoint: &'a [&'a str],
    pub(crate) layer: Layer,
}

impl Layer {
    pub(crate) fn new() -> Self {
        Self { archive: Builder::new(Vec::new()), directories: BTreeSet::new() }
    }

    /// A directory, with those above it.
    pub(crate) fn directory(&mut self, path: &Path) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path.as_os_str().is_empty() || self.directories.contains(path) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        let mut header = header(EntryType::Directory, 0);
        self.archive.append_data(&mut header, path, std::io::empty()).context("adding a directory to the layer")?;
        self.directories.insert(path.to_path_buf());
        Ok(())
    }

    /// A program or library. Links are followed.
    pub(crate) fn file(&mut self, from: &Path, to: &Path) -> Result<()> {
        let to = to.strip_prefix("/").unwrap_or(to);
        self.directory(to.parent().context("a file's place has a directory")?)?;
        let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        let mut header = header(EntryType::Regular, content.len() as u64);
        self.archive.append_data(&mut header, to, &content[..]).with_context(|| format!("adding {}", from.display()))
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, target: &Path, at: &Path) -> Result<()> {
        let at = at.strip_prefix("/").unwrap_or(at);
        self.directory(at.parent().context("a link's place has a directory")?)?;
        let mut header = header(EntryType::Symlink, 0);
        self.archive
            .append_link(&mut header, at, target)
            .with_context(|| format!("adding a link to {}", target.display()))
    }
}

impl Image<'_> {
    /// Writes the image; the digest of its manifest.
    pub(crate) fn write(self, to: &File) -> Result<String> {
        let layer = self.layer.archive.into_inner().context("closing the layer")?;
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": { "Entrypoint": self.entrypoint, "Env": ["PATH=/usr/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
            "history": [{ "created_by": "cargo xtask image" }],
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", &config),
            "layers": [descriptor("layer.v1.tar", &layer)],
        });
        let manifest = manifest.to_string().into_bytes();
        let mut entry = descriptor("manifest.v1+json", &manifest);
        entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
        let (_, tag) = self.name.rsplit_once(':').unwrap_or((self.name, "latest"));
        // The first is containerd's name for it, the second everybody's.
        entry["annotations"] =
            json!({ "io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] }).to_string().into_bytes();

        let mut archive = Builder::new(to);
        let mut add = |name: &str, content: &[u8]| {
            let mut header = header(EntryType::Regular, content.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, content).with_context(|| format!("adding {name} to the image"))
        };
        add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        add("index.json", &index)?;
        for content in [&config, &manifest, &layer] {
            add(&format!("blobs/{}", digest(content).replace(':', "/")), content)?;
        }
        archive.into_inner().and_then(|mut file| file.flush()).context("closing the image")?;
        Ok(digest(&manifest))
    }
}

/// Everything is root's, and from the beginning of time.
fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_size(size);
    header.set_mtime(0);
    header
}

fn descriptor(kind: &str, content: &[u8]) -> Value {
    json!({
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": digest(content),
        "size": content.len(),
    })
}

fn digest(content: &[u8]) -> String {
    let hash = ring::digest::digest(&ring::digest::SHA256, content);
    hash.as_ref().iter().fold("sha256:".to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs::{self, File},
        io::Read,
        path::Path,
    };

    use serde_json::{Value, json};

    use super::{Image, Layer, digest};

    fn files(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(tar);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }

    #[test]
    fn digests() {
        // FIPS 180-2, example B.1.
        let expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest(b"abc"), expected);
    }

    #[test]
    fn an_image_refers_to_what_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::write(&program, "code").unwrap();
        let make = |to: &str| {
            let mut layer = Layer::new();
            layer.file(&program, Path::new("/usr/bin/program")).unwrap();
            layer.directory(Path::new("/usr")).unwrap();
            let image = Image { name: "localhost/program:1", entrypoint: &["/usr/bin/program"], layer };
            let path = directory.path().join(to);
            let digest = image.write(&File::create(&path).unwrap()).unwrap();
            (digest, fs::read(path).unwrap())
        };
        let (manifest, image) = make("first");
        assert_eq!(make("second"), (manifest.clone(), image.clone()), "the same files make the same image");

        let found = files(&image);
        let blob = |descriptor: &Value| {
            let name = descriptor["digest"].as_str().unwrap();
            let content = &found[&format!("blobs/{}", name.replace(':', "/"))];
            assert_eq!((name, descriptor["size"].as_u64()), (digest(content).as_str(), Some(content.len() as u64)));
            content.clone()
        };
        let index: Value = serde_json::from_slice(&found["index.json"]).unwrap();
        assert_eq!(index["manifests"][0]["digest"], json!(manifest));
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "localhost/program:1");
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        let layer = blob(&manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"], json!([digest(&layer)]));
        let layer = files(&layer);
        assert_eq!(layer.keys().collect::<Vec<_>>(), ["usr", "usr/bin", "usr/bin/program"]);
        assert_eq!(layer["usr/bin/program"], b"code");
    }
}
