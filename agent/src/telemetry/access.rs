//! The access log: one line for each connection that ended or was refused.
//!
//! It goes to standard output, the agent's own log to standard error. A line is put together once, in a buffer of the thread, and handed
//! to a writer behind a bounded queue: a reader that stalls costs lines, which are counted, and never holds up a connection.

use std::{
    cell::RefCell,
    fmt::{self, Display},
    fs::File,
    io::{self, BufWriter, Write},
    net::SocketAddr,
    os::fd::AsFd as _,
    time::Duration,
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, WorkerGuard};

use super::{
    Reporter, ResponseFlag,
    labels::{Labels, Party},
    line::{Line, MAX_DETAIL, MAX_NAME},
    logging::{LogFormat, queue},
};

/// Lines are written together when many come at once: bytes of a system call.
const BATCH: usize = 64 * 1024;
/// A buffer that a line made larger than this is given back.
const LINE: usize = 4096;

/// Ties the lines of both agents of a connection together: 16 bytes, as a trace id of W3C Trace Context has. It travels in the tunnel's
/// header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(pub [u8; 16]);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What a line says.
pub struct Record<'a> {
    /// Number of the connection, when it was established.
    pub id: Option<u64>,
    /// The same in the lines of both agents.
    pub trace: Option<TraceId>,
    /// Who is at the ends.
    pub labels: &'a Labels,
    /// Client's address.
    pub source: Option<SocketAddr>,
    /// Where the bytes went, or were to go.
    pub destination: Option<SocketAddr>,
    /// As dialled, when that is another address.
    pub dialled: Option<SocketAddr>,
    /// The service that the client named, as it named it.
    pub service: Option<&'a str>,
    /// What moved, when it was established.
    pub transfer: Option<Transfer<'a>>,
    /// Why it ended.
    pub reason: &'a str,
    /// The same for dashboards.
    pub flag: ResponseFlag,
    /// For people.
    pub detail: Option<&'a dyn Display>,
    /// Whether it ended as both sides wanted.
    pub in_order: bool,
}

/// The part of a [`Record`] that only established connections have.
pub struct Transfer<'a> {
    /// Bytes that the pod on this node sent.
    pub sent: u64,
    /// Bytes that it received.
    pub received: u64,
    /// How long it was open.
    pub duration: Duration,
    /// Who moved and protected the bytes.
    pub data_path: &'a str,
    /// Cipher suite of the tunnel.
    pub cipher: Option<&'a str>,
    /// Whether the tunnel resumed a session.
    pub resumed: bool,
}

/// Which connections of a pod have a line. Decided when one begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogChoice {
    /// None.
    Never,
    /// Those that fail.
    Failures,
    /// All.
    Always,
}

impl LogChoice {
    /// Is there a line for a connection that ended in order, or not?
    fn wants(self, in_order: bool) -> bool {
        match self {
            Self::Never => false,
            Self::Failures => !in_order,
            Self::Always => true,
        }
    }
}

/// Writes the lines.
#[derive(Debug)]
pub struct AccessLog {
    writer: Option<(NonBlocking, ErrorCounter)>,
    format: LogFormat,
}

impl AccessLog {
    /// Writes to standard output. Dropping the guard writes what is queued.
    pub fn stdout(format: LogFormat) -> io::Result<(Self, WorkerGuard)> {
        // Not through `Stdout`, which ends a batch with every line.
        let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Self::to(BufWriter::with_capacity(BATCH, stdout), format))
    }

    /// Writes somewhere.
    pub fn to(writer: impl Write + Send + 'static, format: LogFormat) -> (Self, WorkerGuard) {
        let (writer, guard) = queue(writer, "access-log");
        let dropped = writer.error_counter();
        (Self { writer: Some((writer, dropped)), format }, guard)
    }

    /// Writes nothing.
    pub fn none() -> Self {
        Self { writer: None, format: LogFormat::Text }
    }

    /// Lines that were dropped because the queue was full.
    pub fn dropped(&self) -> u64 {
        self.writer.as_ref().map_or(0, |(_, dropped)| dropped.dropped_lines() as u64)
    }

    /// Writes a line, if one is wanted.
    pub fn write(&self, choice: LogChoice, record: &Record<'_>) {
        thread_local!(static BUFFER: RefCell<String> = const { RefCell::new(String::new()) });
        let Some((writer, _)) = self.writer.as_ref().filter(|_| choice.wants(record.in_order)) else { return };
        BUFFER.with_borrow_mut(|buffer| {
            buffer.clear();
            buffer.shrink_to(LINE);
            record.line(buffer, self.format);
            // The queue takes a copy of just the right size. It never fails: what does not fit is counted.
            let _ = writer.clone().write_all(buffer.as_bytes());
        });
    }
}

impl Record<'_> {
    fn line(&self, out: &mut String, format: LogFormat) {
        let (level, message) = match (&self.transfer, self.in_order) {
            (Some(_), true) => ("INFO", "connection complete"),
            (Some(_), false) => ("WARN", "connection complete"),
            (None, _) => ("WARN", "connection failed"),
        };
        let labels = self.labels;
        let mut line = Line::begin(out, format, level, "access", message);
        if let Some(id) = self.id {
            line.bare("id", id);
        }
        if let Some(trace) = self.trace {
            line.plain("trace_id", trace);
        }
        if let Some(address) = self.source {
            line.plain("src.addr", address);
        }
        party(&mut line, ["src.workload", "src.namespace", "src.identity"], &labels.source);
        if let Some(address) = self.destination {
            line.plain("dst.addr", address);
        }
        if let Some(address) = self.dialled {
            line.plain("dst.dialled_addr", address);
        }
        if let Some(service) = self.service {
            line.text("dst.service", service, MAX_NAME);
        }
        party(&mut line, ["dst.workload", "dst.namespace", "dst.identity"], &labels.destination);
        line.plain(
            "direction",
            match labels.reporter {
                Reporter::Source => "outbound",
                Reporter::Destination => "inbound",
            },
        );
        if let Some(transfer) = &self.transfer {
            line.bare("bytes_sent", transfer.sent);
            line.bare("bytes_recv", transfer.received);
            line.plain("duration", format_args!("{}ms", transfer.duration.as_millis()));
            line.plain("data_path", transfer.data_path);
            if let Some(cipher) = transfer.cipher {
                line.plain("cipher", cipher);
                line.bare("resumed", transfer.resumed);
            }
        }
        line.plain("reason", self.reason);
        line.plain("response_flags", self.flag.as_str());
        if let Some(detail) = self.detail {
            line.display("error", detail, MAX_DETAIL);
        }
        line.end();
    }
}

fn party(line: &mut Line<'_>, [workload, namespace, identity]: [&str; 3], party: &Party) {
    if let Some(name) = &party.workload {
        line.text(workload, name, MAX_NAME);
    }
    if let Some(name) = &party.namespace {
        line.text(namespace, name, MAX_NAME);
    }
    if let Some(principal) = &party.principal {
        line.plain(identity, principal);
    }
}
