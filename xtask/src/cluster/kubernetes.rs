//! The source of Kubernetes, made ready to be built.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{go::Go, parts::fetch};
use crate::{
    exec,
    setup::apt::Sandbox,
    ui::{Step, Ui},
};

/// Debian's source package: upstream's files, with every dependency in `vendor`.
const PACKAGE: &str = "kubernetes";
const VERSION: &str = "1.20.2";
/// The tree's name as a package of Go.
const IMPORT: &str = "k8s.io/kubernetes";
/// Its own edition of this crashes the API server at the first server-side apply, since Go 1.18. (modern-go/reflect2 1.0.2 is the remedy.)
const REFLECT: &str = "github.com/modern-go/reflect2";
const REFLECT_PACKAGE: &str = "golang-github-modern-go-reflect2-dev";
/// The one generated file that is not in the package: what the API server says of its API.
const OPENAPI: &str = "pkg/generated/openapi";
const OPENAPI_FILE: &str = "zz_generated.openapi";
/// Types whose files have this are described in it.
const OPENAPI_TAG: &str = "+k8s:openapi-gen=";
/// Places with such types, and parts of them that belong to other programs.
const OPENAPI_PLACES: [&str; 4] = ["pkg", "cmd", "plugin", "vendor/k8s.io"];
const OPENAPI_OTHERS: [&str; 2] = ["vendor/k8s.io/code-generator", "vendor/k8s.io/sample-apiserver"];

/// A tree that can be built.
pub(super) struct Source {
    go: Go,
    tree: PathBuf,
    programs: PathBuf,
}

impl Source {
    /// Downloads, unpacks, corrects and generates below `scratch`; goes on where an earlier try was interrupted.
    pub(super) fn prepare(ui: &Ui, sandbox: &Sandbox, scratch: &Path) -> Result<Self> {
        let path = scratch.join("workspace");
        let (tree, programs) = (path.join("src").join(IMPORT), scratch.join("programs"));
        fs::create_dir_all(&programs).with_context(|| format!("creating {}", programs.display()))?;
        let go = ui.step("Debian's Go 1.19, unpacked", |step| Go::unpack(sandbox, scratch, &path, step))?;
        if !tree.is_dir() {
            ui.step(&format!("the source of Kubernetes {VERSION}"), |step| unpack(sandbox, scratch, &tree, step))?;
        }
        let source = Self { go, tree, programs };
        if !source.tree.join(OPENAPI).join(format!("{OPENAPI_FILE}.go")).is_file() {
            ui.step("generating the API's description", |step| source.generate(step))?;
        }
        Ok(source)
    }

    /// Builds one program; its path.
    pub(super) fn build(&self, program: &str, step: &Step) -> Result<PathBuf> {
        let to = self.programs.join(program);
        let (major, minor) = ("1", "20");
        let component = format!("{IMPORT}/vendor/k8s.io/component-base/version");
        let client = format!("{IMPORT}/vendor/k8s.io/client-go/pkg/version");
        let variables = [
            format!("{component}.gitVersion=v{VERSION}"),
            format!("{component}.gitMajor={major}"),
            format!("{component}.gitMinor={minor}"),
            format!("{client}.gitVersion=v{VERSION}"),
        ];
        let flags = variables.iter().fold("-s -w".to_owned(), |all, variable| format!("{all} -X {variable}"));
        let package = format!("{IMPORT}/cmd/{program}");
        self.go.build(&self.tree, &package, &["-trimpath", "-ldflags", &flags], &to, step)?;
        Ok(to)
    }

    /// Generates the missing file, as the tree's own makefile does. Its list of known offences against API rules shows that nothing was left out.
    fn generate(&self, step: &Step) -> Result<()> {
        let generator = self.programs.join("openapi-gen");
        let package = format!("{IMPORT}/vendor/k8s.io/kube-openapi/cmd/openapi-gen");
        self.go.build(&self.tree, &package, &[], &generator, step)?;
        let packages: Vec<_> = self.described()?.iter().map(|place| format!("{IMPORT}/{}", place.display())).collect();
        let report = self.programs.join("violations");
        let mut command = self.go.command(&generator, &self.tree);
        command.args(["--logtostderr", "-i", &packages.join(","), "-p", &format!("{IMPORT}/{OPENAPI}")]);
        // Its own name, until it is known to be right.
        command.args(["-O", "unverified", "-h", "vendor/k8s.io/code-generator/hack/boilerplate.go.txt", "-r"]);
        exec::quietly(command.arg(&report), step)?;
        let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
        ensure!(
            read(&report)? == read(&self.tree.join("api/api-rules/violation_exceptions.list"))?,
            "the API's description of {} packages is not the one that Kubernetes {VERSION} is known to have: {} differs from \
             api/api-rules/violation_exceptions.list",
            packages.len(),
            report.display()
        );
        let directory = self.tree.join(OPENAPI);
        fs::rename(directory.join("unverified.go"), directory.join(format!("{OPENAPI_FILE}.go")))
            .context("naming the API's description")
    }

    /// Directories with types that are described, relative to the tree, in order.
    fn described(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for place in OPENAPI_PLACES {
            look(&self.tree, Path::new(place), &mut found)?;
        }
        found.sort_unstable();
        Ok(found)
    }
}

/// Adds the directories below `place` with a tagged file.
fn look(tree: &Path, place: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    if OPENAPI_OTHERS.iter().any(|other| Path::new(other) == place) {
        return Ok(());
    }
    let directory = tree.join(place);
    let mut tagged = false;
    for entry in fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))? {
        let name = entry?.file_name();
        let (path, text) = (directory.join(&name), name.to_string_lossy());
        // Followed, because the parts that are published on their own are links in `vendor`.
        if path.is_dir() {
            look(tree, &place.join(&name), found)?;
        } else if text.ends_with(".go") && !text.ends_with("_test.go") && !tagged {
            let content = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            tagged = String::from_utf8_lossy(&content).contains(OPENAPI_TAG);
        }
    }
    if tagged {
        found.push(place.to_path_buf());
    }
    Ok(())
}

/// Makes `tree` of Debian's package, at once.
fn unpack(sandbox: &Sandbox, scratch: &Path, tree: &Path, step: &Step) -> Result<()> {
    let versions = sandbox.versions(PACKAGE)?;
    let version = versions.iter().find(|version| version.contains(VERSION));
    let version = version.with_context(|| format!("no {PACKAGE} {VERSION} is on offer, only: {versions:?}"))?;
    let files = sandbox.download_source(PACKAGE, version, step)?;
    let archive = fs::read_dir(&files)?.flatten().map(|file| file.path());
    let archive = archive.into_iter().find(|path| path.to_string_lossy().ends_with(".orig.tar.gz"));
    let archive = archive.with_context(|| format!("{PACKAGE} {version} has no .orig.tar.gz"))?;
    let parent = tree.parent().context("the tree is somewhere")?;
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let new = tempfile::tempdir_in(scratch).context("creating a directory")?;
    step.now("unpacking");
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--gzip", "--no-same-owner", "--strip-components=1", "--file"]).arg(&archive);
    exec::quietly(tar.arg("--directory").arg(new.path()), step)?;

    let reflect = new.path().join("vendor").join(REFLECT);
    fs::remove_dir_all(&reflect).with_context(|| format!("removing {}", reflect.display()))?;
    let better = fetch(sandbox, REFLECT_PACKAGE, scratch, step)?.join("usr/share/gocode/src").join(REFLECT);
    exec::quietly(Command::new("cp").arg("-a").arg(&better).arg(&reflect), step)?;
    fs::rename(new.keep(), tree).with_context(|| format!("creating {}", tree.display()))
}
