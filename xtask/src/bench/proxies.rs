//! Pairs of other proxies: one beside the client, which dials with TLS, and one beside the server, which accepts it.
//!
//! All of them: TLS 1.3 with AES-128-GCM, certificates of both sides verified, processes as many as processors where there is a choice.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use testbed::{Pod, Process, pace};

use super::{certificates::Certificates, system::Peer};

/// How long a proxy may take until it listens.
const START: Duration = Duration::from_secs(20);
/// Where Debian's package has nginx' module for TCP.
pub(crate) const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
/// The cipher suite, as OpenSSL calls it.
const SUITE: &str = "TLS_AES_128_GCM_SHA256";

/// One proxy of a pair.
pub(super) struct End<'a> {
    pub(super) pod: &'a Pod,
    pub(super) side: Side,
    pub(super) listen: SocketAddr,
    pub(super) target: SocketAddr,
    /// Whether every handshake is a full one.
    pub(super) cold: bool,
    pub(super) certificates: &'a Certificates,
    /// For its files.
    pub(super) directory: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

impl End<'_> {
    /// nginx' stream module.
    pub(super) fn nginx(&self, processes: usize, descriptors: u64) -> Result<Process> {
        let directory = self.directory.display();
        let (certificate, key, authority) = self.files();
        let reuse = if self.cold { "off" } else { "on" };
        let tls = match self.side {
            Side::Client => format!(
                "proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_conf_command Ciphersuites {SUITE};\n\
                 proxy_ssl_certificate {certificate}; proxy_ssl_certificate_key {key};\n\
                 proxy_ssl_trusted_certificate {authority}; proxy_ssl_verify on; proxy_ssl_name server;\n\
                 proxy_ssl_session_reuse {reuse};\n"
            ),
            Side::Server => format!(
                "ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites {SUITE};\n\
                 ssl_certificate {certificate}; ssl_certificate_key {key};\n\
                 ssl_client_certificate {authority}; ssl_verify_client on;\n\
                 ssl_session_tickets {reuse}; ssl_session_cache {};\n",
                if self.cold { "off" } else { "shared:sessions:16m" }
            ),
        };
        let (listen, target) = (self.listen, self.target);
        let ssl = if self.side == Side::Server { " ssl" } else { "" };
        let config = format!(
            "load_module {NGINX_STREAM};\ndaemon off;\nuser root;\nworker_processes {processes};\npid {directory}/pid;\n\
             error_log stderr warn;\nworker_rlimit_nofile {descriptors};\nevents {{ worker_connections {descriptors}; }}\n\
             stream {{ server {{\nlisten {listen}{ssl} backlog=4096;\nproxy_pass {target};\nproxy_buffer_size 64k;\n{tls}}} }}\n"
        );
        let file = self.write("nginx.conf", &config)?;
        let prefix = self.directory.display().to_string();
        self.start(self.pod.command_outside_cgroup("nginx").args(["-p", &prefix, "-e", "stderr", "-c"]).arg(file))
    }

    /// stunnel, a thread for each connection.
    pub(super) fn stunnel(&self) -> Result<Process> {
        let (certificate, key, authority) = self.files();
        let resume = if self.cold { "no" } else { "yes" };
        let (listen, target) = (self.listen, self.target);
        let config = format!(
            "foreground = yes\npid =\ndebug = warning\n[bench]\nclient = {}\naccept = {listen}\nconnect = {target}\n\
             cert = {certificate}\nkey = {key}\nCAfile = {authority}\nverifyChain = yes\nsslVersion = TLSv1.3\n\
             ciphersuites = {SUITE}\nsessionResume = {resume}\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n",
            if self.side == Side::Client { "yes" } else { "no" }
        );
        let file = self.write("stunnel.conf", &config)?;
        self.start(self.pod.command_outside_cgroup("stunnel4").arg(file))
    }

    /// A command that is told by its environment what to do.
    pub(super) fn peer(&self, peer: &Peer) -> Result<Process> {
        let (certificate, key, authority) = self.files();
        fs::create_dir_all(&self.directory)?;
        let mut command = self.pod.command_outside_cgroup("/bin/sh");
        command.args(["-c", &peer.command]).env("BENCH_SIDE", self.side.name());
        command.env("BENCH_LISTEN", self.listen.to_string()).env("BENCH_TARGET", self.target.to_string());
        command.env("BENCH_CERT", certificate).env("BENCH_KEY", key).env("BENCH_CA", authority);
        command.env("BENCH_RESUME", if self.cold { "no" } else { "yes" }).env("BENCH_DIR", &self.directory);
        self.start(&mut command)
    }

    fn files(&self) -> (String, String, String) {
        let name = self.side.name();
        let (certificate, key) = (self.certificates.certificate(name), self.certificates.key(name));
        (
            certificate.display().to_string(),
            key.display().to_string(),
            self.certificates.authority().display().to_string(),
        )
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        fs::create_dir_all(&self.directory).with_context(|| format!("creating {}", self.directory.display()))?;
        let file = self.directory.join(name);
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }

    fn start(&self, command: &mut Command) -> Result<Process> {
        let process = Process::spawn(command)?;
        wait_listening(self.pod, self.listen.port(), &process)?;
        Ok(process)
    }
}

/// Waits until something in the pod listens on `port`.
fn wait_listening(pod: &Pod, port: u16, process: &Process) -> Result<()> {
    /// The kernel tells nobody when a socket begins to listen, so it is asked again.
    const ASK_AGAIN: Duration = Duration::from_millis(20);
    let deadline = std::time::Instant::now() + pace::patience(START);
    loop {
        let table = pod.enter(|| fs::read_to_string("/proc/thread-self/net/tcp"))?.context("reading /proc/net/tcp")?;
        if table.lines().any(|line| listens(line, port)) {
            return Ok(());
        }
        let output = || process.text(testbed::Stream::Stderr) + &process.text(testbed::Stream::Stdout);
        ensure!(process.status().is_none(), "it ended before it listened on port {port}; it said:\n{}", output());
        ensure!(std::time::Instant::now() < deadline, "nothing listens on port {port}; it said:\n{}", output());
        std::thread::sleep(ASK_AGAIN);
    }
}

/// Whether a line of `/proc/net/tcp` is a listening socket's of this port: `0: 0100007F:1BBC 00000000:0000 0A …`.
fn listens(line: &str, port: u16) -> bool {
    let mut fields = line.split_whitespace().skip(1);
    let (local, _, state) = (fields.next(), fields.next(), fields.next());
    local.and_then(|local| local.rsplit_once(':')).is_some_and(|(_, local)| u16::from_str_radix(local, 16) == Ok(port))
        && state == Some("0A")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernels_table() {
        let line = "   0: 0100007F:1BBC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        assert!(super::listens(line, 7100));
        assert!(!super::listens(line, 7101));
        assert!(!super::listens(&line.replace(" 0A ", " 01 "), 7100));
        assert!(!super::listens("  sl  local_address rem_address   st tx_queue", 7100));
    }
}
