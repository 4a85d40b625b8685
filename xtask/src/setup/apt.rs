//! apt with lists of its own, so that packages of other suites can be fetched without changing the machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{exec, places, ui::Step};

/// Environment variable with the address of a Debian mirror, for machines whose own mirrors have another distribution.
const MIRROR: &str = "UNDERPASS_DEBIAN_MIRROR";

/// Private lists and cache below a directory.
pub(crate) struct Sandbox {
    directory: PathBuf,
    options: Vec<String>,
}

impl Sandbox {
    /// The suites of this machine's distribution from its release on to the newest.
    pub(crate) fn with_newer_suites(directory: &Path) -> Result<Self> {
        let machine = Machine::read()?;
        let (name, mirror) = (&machine.codename, machine.mirror()?);
        let mut text = String::new();
        if machine.ubuntu {
            text += &mirror.stanza(&format!("{name} {name}-updates devel devel-updates"), "main universe");
        } else {
            text += &mirror.stanza("stable-backports testing unstable experimental", "main");
        }
        if let Some(security) = machine.security() {
            let suites =
                if machine.ubuntu { format!("{name}-security") } else { "oldstable-security stable-security".into() };
            text += &security.stanza(&suites, "main");
        }
        Self::new(directory, &text)
    }

    /// Suites of Debian, whatever is installed here and whichever distribution this is; `release` is preferred over the others.
    ///
    /// Suites that end in `-security` are looked for at the security mirror.
    pub(crate) fn debian(directory: &Path, suites: &[&str], release: &str) -> Result<Self> {
        let (mirror, security) = Machine::read()?.debian(places::variable(MIRROR).as_deref())?;
        let (updates, plain): (Vec<&str>, Vec<&str>) = suites.iter().partition(|suite| suite.ends_with("-security"));
        let mut text = mirror.stanza(&plain.join(" "), "main");
        if let Some(security) = security.filter(|_| !updates.is_empty()) {
            text += &security.stanza(&updates.join(" "), "main");
        }
        let mut sandbox = Self::new(directory, &text)?;
        // As if nothing were installed: what is downloaded must run without anything of this machine's.
        let status = directory.join("status");
        fs::write(&status, "").with_context(|| format!("writing {}", status.display()))?;
        let more = [format!("Dir::State::status={}", status.display()), format!("APT::Default-Release={release}")];
        sandbox.options.extend(more.into_iter().flat_map(|option| ["-o".to_owned(), option]));
        Ok(sandbox)
    }

    /// Debian 12 and its security updates, where the compiler for browsers is kept current.
    pub(crate) fn with_debian_security(directory: &Path) -> Result<Self> {
        let machine = Machine::read()?;
        ensure!(!machine.ubuntu, "rustc-web is a package of Debian, and this machine's mirrors have Ubuntu");
        let security = machine.security().context("this machine's apt sources name no security mirror")?;
        let text = machine.mirror()?.stanza("bookworm", "main") + &security.stanza("bookworm-security", "main");
        Self::new(directory, &text)
    }

    fn new(directory: &Path, sources: &str) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial", "download"] {
            fs::create_dir_all(directory.join(part)).with_context(|| format!("creating {}", directory.display()))?;
        }
        let list = directory.join("private.sources");
        fs::write(&list, sources).with_context(|| format!("writing {}", list.display()))?;
        let options = [
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Dir::Etc::preferencesparts=/dev/null".into(),
            format!("Dir::State::Lists={}", directory.join("lists").display()),
            format!("Dir::Cache={}", directory.join("cache").display()),
            "APT::Sandbox::User=root".into(),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            "Acquire::Retries=2".into(),
            "Debug::NoLocking=true".into(),
        ];
        let options = options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect();
        Ok(Self { directory: directory.to_path_buf(), options })
    }

    /// Has source packages, too.
    pub(crate) fn with_sources(self) -> Result<Self> {
        let list = self.directory.join("private.sources");
        let text = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
        fs::write(&list, text.replace("Types: deb\n", "Types: deb deb-src\n"))
            .with_context(|| format!("writing {}", list.display()))?;
        Ok(self)
    }

    /// Fetches the lists. A suite that a mirror does not have is no failure: what is found is looked at.
    pub(crate) fn update(&self, step: &Step) -> Result<()> {
        let result = exec::quietly(self.apt("apt-get").arg("update"), step);
        let lists = fs::read_dir(self.directory.join("lists"))?.flatten();
        let any = lists.filter(|file| file.file_name().to_string_lossy().contains("Packages")).count() > 0;
        if any { Ok(()) } else { result.and(Err(anyhow::anyhow!("the mirrors gave no package list"))) }
    }

    /// Versions of a package on offer, from new to old.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        Ok(madison(&exec::output(self.apt("apt-cache").args(["madison", package]))?))
    }

    /// What a version of a package depends on, in the words of its control file.
    pub(crate) fn depends(&self, package: &str, version: &str) -> Result<String> {
        let control = exec::output(self.apt("apt-cache").args(["show", &format!("{package}={version}")]))?;
        Ok(control.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default().trim().to_owned())
    }

    /// Downloads one package file.
    pub(crate) fn download(&self, package: &str, version: &str, step: &Step) -> Result<PathBuf> {
        let into = self.directory.join("download").join(package);
        fs::create_dir_all(&into).with_context(|| format!("creating {}", into.display()))?;
        exec::quietly(
            self.apt("apt-get").args(["download", &format!("{package}={version}")]).current_dir(&into),
            step,
        )?;
        package_files(&into)?.pop().with_context(|| format!("apt-get downloaded no file for {package} {version}"))
    }

    /// Downloads the files of a source package, verified; the directory that they are in.
    pub(crate) fn download_source(&self, package: &str, version: &str, step: &Step) -> Result<PathBuf> {
        let into = self.directory.join("download").join(package);
        fs::create_dir_all(&into).with_context(|| format!("creating {}", into.display()))?;
        let mut apt = self.apt("apt-get");
        apt.args(["source", "--download-only", "--only-source", &format!("{package}={version}")]).current_dir(&into);
        exec::quietly(&mut apt, step)?;
        Ok(into)
    }

    /// Downloads packages and what they need that is not installed.
    pub(crate) fn download_with_dependencies(&self, packages: &[&str], step: &Step) -> Result<Vec<PathBuf>> {
        let mut apt = self.apt("apt-get");
        apt.args(["install", "--download-only", "--reinstall", "--yes", "--no-install-recommends"]).args(packages);
        exec::quietly(&mut apt, step)?;
        package_files(&self.directory.join("cache/archives"))
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// The versions in the table that `apt-cache madison` prints: package, version and source, separated by bars.
fn madison(table: &str) -> Vec<String> {
    table.lines().filter_map(|line| line.split('|').nth(1)).map(|version| version.trim().to_owned()).collect()
}

/// Unpacks a package file without installing it.
pub(crate) fn unpack(package: &Path, into: &Path, step: &Step) -> Result<()> {
    fs::create_dir_all(into)?;
    exec::quietly(Command::new("dpkg-deb").arg("--extract").arg(package).arg(into), step)
}

fn package_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let files = fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))?;
    Ok(files.flatten().map(|file| file.path()).filter(|path| path.extension().is_some_and(|e| e == "deb")).collect())
}

/// An entry of apt's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    /// A key file.
    signed_by: Option<String>,
}

impl Source {
    /// The same mirror with other suites, in the format of `.sources` files.
    fn stanza(&self, suites: &str, components: &str) -> String {
        let signed_by = self.signed_by.as_ref().map_or_else(String::new, |file| format!("Signed-By: {file}\n"));
        format!("Types: deb\nURIs: {}\nSuites: {suites}\nComponents: {components}\n{signed_by}\n", self.uris.join(" "))
    }
}

/// What apt on this machine is configured to.
struct Machine {
    ubuntu: bool,
    codename: String,
    sources: Vec<Source>,
}

impl Machine {
    fn read() -> Result<Self> {
        ensure!(places::program("apt-get").is_some(), "there is no apt-get here");
        let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
        let field = |name: &str| {
            let value = release.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            value.trim_matches('"').to_owned()
        };
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(more) = fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(more.flatten().map(|file| file.path()));
        }
        let mut sources = Vec::new();
        for file in files {
            let Ok(text) = fs::read_to_string(&file) else { continue };
            match file.extension().and_then(|e| e.to_str()) {
                Some("sources") => sources.extend(deb822(&text)),
                Some("list") => sources.extend(one_line(&text)),
                _ => {}
            }
        }
        let ubuntu = field("ID=") == "ubuntu" || field("ID_LIKE=").split(' ').any(|like| like == "ubuntu");
        Ok(Self { ubuntu, codename: field("VERSION_CODENAME="), sources })
    }

    /// The distribution's main mirror.
    fn mirror(&self) -> Result<Source> {
        let by_suite = self.sources.iter().find(|source| source.suites.contains(&self.codename));
        // Rolling releases are configured by names such as "testing".
        let distribution = if self.ubuntu { "/ubuntu" } else { "/debian" };
        let ends = |source: &&Source| source.uris.iter().any(|uri| uri.trim_end_matches('/').ends_with(distribution));
        let found = by_suite.or_else(|| self.sources.iter().find(ends));
        Ok(self.with_key(found.context("apt's configuration names no mirror of the distribution")?))
    }

    fn security(&self) -> Option<Source> {
        let found = self.sources.iter().find(|source| source.suites.iter().any(|suite| suite.ends_with("-security")));
        found.map(|source| self.with_key(source))
    }

    /// Debian's main mirror and its security mirror; `given` is an address that the user has set.
    fn debian(&self, given: Option<&Path>) -> Result<(Source, Option<Source>)> {
        let key = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        if let Some(given) = given {
            ensure!(
                key.exists(),
                "{} is missing, which Debian's package lists are verified with: install debian-archive-keyring",
                key.display()
            );
            let given = given.to_string_lossy();
            let address = given.trim_end_matches('/');
            // Everywhere the security archive is the neighbour of the main one.
            let source = |uri: String| Source {
                uris: vec![uri],
                signed_by: Some(key.display().to_string()),
                ..Source::default()
            };
            return Ok((source(address.to_owned()), Some(source(format!("{address}-security")))));
        }
        ensure!(
            !self.ubuntu,
            "this machine's apt mirrors have Ubuntu, and Debian's packages are needed: set {MIRROR} to the address of a mirror, \
             the directory that has dists/bookworm and dists/sid"
        );
        Ok((self.mirror()?, self.security()))
    }

    /// Other suites may be signed by keys that are not in apt's general key ring.
    fn with_key(&self, source: &Source) -> Source {
        let name = if self.ubuntu { "ubuntu" } else { "debian" };
        let key = format!("/usr/share/keyrings/{name}-archive-keyring.gpg");
        let signed_by = source.signed_by.clone().or_else(|| Path::new(&key).exists().then_some(key));
        Source { signed_by, ..source.clone() }
    }
}

/// Reads the format of `.sources` files (deb822).
fn deb822(text: &str) -> Vec<Source> {
    let lines = text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let stanzas = lines.split("\n\n").map(|stanza| {
        let field = |name: &str| -> Vec<String> {
            let line = stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then_some(value)
            });
            line.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        let enabled = field("Enabled").first().is_none_or(|value| value != "no");
        let binary = field("Types").iter().any(|kind| kind == "deb");
        let signed_by = field("Signed-By").into_iter().find(|file| file.starts_with('/'));
        (enabled && binary).then(|| Source { uris: field("URIs"), suites: field("Suites"), signed_by })
    });
    stanzas.flatten().filter(|source| !source.uris.is_empty()).collect()
}

/// Reads the format of `.list` files.
fn one_line(text: &str) -> Vec<Source> {
    let entries = text.lines().filter_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?.to_owned(), words.next()?.to_owned());
        let signed_by =
            options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned);
        Some(Source { uris: vec![uri], suites: vec![suite], signed_by })
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use super::{Source, deb822, madison, one_line};

    #[test]
    fn versions_on_offer() {
        let table = " linux-image |   7.2.13-1 | http://mirror.example/debian sid/main amd64 Packages\n \
                     linux-image | 6.12.95-1~bpo12+1 | http://mirror.example/debian bookworm-backports/main amd64 Packages\n";
        assert_eq!(madison(table), ["7.2.13-1", "6.12.95-1~bpo12+1"]);
        assert!(madison("N: Unable to locate package\n").is_empty());
    }

    #[test]
    fn both_formats_are_read() {
        let stanzas = "# a comment\nTypes: deb deb-src\n# another\nURIs: http://mirror.example/debian\nSuites: stable stable-updates\n\
                       Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n\nTypes: deb-src\nURIs: http://x.example\nSuites: a\n\n\
                       Types: deb\nEnabled: no\nURIs: http://y.example\nSuites: b\n";
        let expected = Source {
            uris: vec!["http://mirror.example/debian".into()],
            suites: vec!["stable".into(), "stable-updates".into()],
            signed_by: Some("/usr/share/keyrings/k.gpg".into()),
        };
        assert_eq!(deb822(stanzas), std::slice::from_ref(&expected));

        let lines = "# deb http://z.example c main\ndeb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/debian stable main\n\
                     deb http://mirror.example/ubuntu noble-security main universe\ndeb-src http://mirror.example/debian stable main\n";
        let first = Source { suites: vec!["stable".into()], ..expected };
        let second = Source {
            uris: vec!["http://mirror.example/ubuntu".into()],
            suites: vec!["noble-security".into()],
            signed_by: None,
        };
        assert_eq!(one_line(lines), [first.clone(), second]);
        assert!(first.stanza("testing", "main").contains("Suites: testing\n"));
    }

    #[test]
    fn inline_keys_are_not_taken_for_files() {
        let stanza = "Types: deb\nURIs: http://mirror.example/debian\nSuites: stable\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n";
        assert_eq!(deb822(stanza)[0].signed_by, None);
    }
}
