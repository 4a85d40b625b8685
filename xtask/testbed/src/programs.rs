//! Servers that people really run, started in pods.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};

use crate::{pod::Pod, process::Process};

/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(20);

/// nginx, serving a directory.
pub struct Nginx {
    /// The running master process.
    pub process: Process,
    dir: PathBuf,
}

impl Nginx {
    /// Starts it on `port`, IPv4 and IPv6. It serves [`root`](Self::root); `/` answers with `body`.
    pub fn start(pod: &Pod, port: u16, body: &str) -> Result<Self> {
        let dir = pod.dir(&format!("nginx{port}"))?;
        let path = dir.display();
        fs::create_dir_all(dir.join("root"))?;
        fs::write(dir.join("root/index.html"), body)?;
        let config = format!(
            "daemon off;\nuser root;\nworker_processes 1;\npid {path}/pid;\nerror_log stderr notice;\n\
             events {{ worker_connections 8192; }}\n\
             http {{\n  log_format seen '$remote_addr $remote_port $server_addr $server_port $status \"$request\"';\n  \
             access_log /dev/stdout seen;\n  keepalive_requests 1000000;\n  sendfile on;\n  \
             client_body_temp_path {path}/body;\n  client_max_body_size 0;\n  proxy_temp_path {path}/proxy;\n  \
             fastcgi_temp_path {path}/fastcgi;\n  uwsgi_temp_path {path}/uwsgi;\n  scgi_temp_path {path}/scgi;\n  \
             server {{\n    listen {port};\n    listen [::]:{port};\n    root {path}/root;\n  }}\n}}\n"
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config).with_context(|| format!("writing {}", file.display()))?;
        let (prefix, file) = (dir.display().to_string(), file.display().to_string());
        let process = pod.spawn(&["nginx", "-p", &prefix, "-e", "stderr", "-c", &file])?;
        // The master says so after it has opened its listening sockets.
        process.wait_line("start worker process ", START)?;
        Ok(Self { process, dir })
    }

    /// The directory served.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The first `count` requests, one line each: client address, client port, server address, server port, status, request.
    /// Waits until they are logged, which is after the response has been sent.
    pub fn access_log(&self, count: usize) -> Result<Vec<String>> {
        self.process.wait_stdout(count, Duration::from_secs(10)).context("waiting for nginx's access log")
    }
}

/// redis-server, without persistence.
pub struct Redis {
    /// The running server.
    pub process: Process,
}

impl Redis {
    /// Starts it on `port`, IPv4 and IPv6.
    pub fn start(pod: &Pod, port: u16) -> Result<Self> {
        let (port, dir) = (port.to_string(), pod.dir("redis")?.display().to_string());
        let process = pod.spawn(&[
            "redis-server",
            "--port",
            &port,
            "--bind",
            "*",
            "-::*",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            &dir,
            "--daemonize",
            "no",
        ])?;
        process.wait_line("Ready to accept connections", START)?;
        Ok(Self { process })
    }
}

/// iperf3 as a server.
pub struct Iperf {
    /// The running server.
    pub process: Process,
}

impl Iperf {
    /// Starts it on `port`, IPv4 and IPv6.
    pub fn start(pod: &Pod, port: u16) -> Result<Self> {
        let process = pod.spawn(&["iperf3", "--server", "--port", &port.to_string(), "--forceflush"])?;
        process.wait_line("Server listening", START)?;
        Ok(Self { process })
    }

    /// Runs a client in `pod` for `seconds` and returns the gigabits per second that the server received.
    pub fn measure(pod: &Pod, server: &str, port: u16, seconds: u32) -> Result<f64> {
        let (port, time) = (port.to_string(), seconds.to_string());
        let within = Duration::from_secs(u64::from(seconds) + 30);
        let text =
            pod.run(&["iperf3", "--client", server, "--port", &port, "--time", &time, "--json"], within)?.success()?;
        let report: serde_json::Value = serde_json::from_str(&text).context("reading iperf3's report")?;
        let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(bits.with_context(|| format!("iperf3's report has no sum_received: {text}"))? / 1e9)
    }
}
