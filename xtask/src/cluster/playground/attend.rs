//! The process that looks after a playground: it carries connections from the machine to the API, and keeps logs from growing.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use testbed::{
    Namespace,
    kube::{arguments::API_PORT, carry},
};

/// A log that is larger than this is emptied.
const LOG: u64 = 32 << 20;
const LOOK: Duration = Duration::from_secs(10);
/// Connections at once. More are closed.
const CONNECTIONS: usize = 1024;

#[derive(clap::Args)]
pub(in crate::cluster) struct Attend {
    #[arg(long)]
    namespace: String,
    #[arg(long)]
    logs: PathBuf,
}

/// Prints the port of 127.0.0.1 that leads to the API, and goes on until it is killed.
pub(in crate::cluster) fn run(options: &Attend) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on 127.0.0.1")?;
    let mut out = io::stdout();
    writeln!(out, "{}", listener.local_addr().context("asking for the port")?.port())
        .and_then(|()| out.flush())
        .context("printing the port")?;
    let logs = options.logs.clone();
    thread::spawn(move || {
        loop {
            if let Err(error) = cut(&logs, LOG) {
                eprintln!("{error:#}");
            }
            thread::sleep(LOOK);
        }
    });
    let open = Arc::new(AtomicUsize::new(0));
    for client in listener.incoming() {
        // A connection that fails is the client's to notice; so is one too many.
        let Ok(client) = client else { continue };
        if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (namespace, open) = (Namespace::existing(&options.namespace), Arc::clone(&open));
        thread::spawn(move || {
            carry(&namespace, SocketAddr::from((Ipv4Addr::LOCALHOST, API_PORT)), &client);
            open.fetch_sub(1, Ordering::AcqRel);
        });
    }
    Ok(())
}

/// Empties the logs that are larger than `limit`.
fn cut(logs: &Path, limit: u64) -> Result<()> {
    for entry in fs::read_dir(logs).with_context(|| format!("listing {}", logs.display()))? {
        let entry = entry?;
        if entry.metadata()?.len() > limit {
            let file = OpenOptions::new().write(true).truncate(true).open(entry.path());
            file.with_context(|| format!("emptying {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::cut;

    #[test]
    fn only_large_logs_are_emptied() {
        let logs = tempfile::tempdir().unwrap();
        let [small, large] = ["small", "large"].map(|name| logs.path().join(name));
        fs::write(&small, "1234").unwrap();
        fs::write(&large, "12345").unwrap();
        cut(logs.path(), 4).unwrap();
        assert_eq!([small, large].map(|path| fs::metadata(path).unwrap().len()), [4, 0]);
    }
}
