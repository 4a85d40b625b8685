//! rustls' unbuffered connections without I/O: bytes in, bytes out, and at the end the keys.
//!
//! Records are shown to rustls one at a time, so that it never opens one that comes after the handshake: what is
//! left over starts at a record boundary and is untouched, which is what both the user-space records and kernel TLS need.

use std::mem;

use rustls::{
    CommonState, Error, ExtractedSecrets,
    client::{ClientConnectionData, UnbufferedClientConnection},
    kernel::KernelConnection,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};

use super::{
    post_handshake::Schedule,
    records::{HEADER, MAX_RECORD},
};

/// Most bytes of records in one handshake; a long chain needs a tenth of it.
const MAX_HANDSHAKE: usize = 256 * 1024;

/// What the driver needs next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// At least one more byte; `missing` bytes complete the record's header or its body.
    Receive { missing: usize },
    /// Nothing: once `outgoing` is sent the keys can be taken.
    Done,
}

/// Why the handshake failed.
#[derive(Debug)]
pub(super) enum DriverError {
    /// The peer does not speak TLS.
    NotTls(String),
    /// rustls refused; its alert is in `outgoing`.
    Tls(Error),
}

/// Both kinds of unbuffered connection.
pub(super) trait Unbuffered {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn into_kernel(self) -> Result<(ExtractedSecrets, Schedule), Error>;
}

impl Unbuffered for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_kernel(self) -> Result<(ExtractedSecrets, Schedule), Error> {
        let (secrets, kernel): (_, KernelConnection<_>) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Schedule::Client(Box::new(kernel))))
    }
}

impl Unbuffered for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_kernel(self) -> Result<(ExtractedSecrets, Schedule), Error> {
        let (secrets, kernel): (_, KernelConnection<_>) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Schedule::Server(Box::new(kernel))))
    }
}

/// One handshake.
pub(super) struct Driver<C> {
    pub(super) connection: C,
    /// To be sent, then cleared, whenever [`advance`](Self::advance) returns, also with an error.
    pub(super) outgoing: Vec<u8>,
    /// Received bytes are appended here.
    pub(super) incoming: Vec<u8>,
    /// How much of `incoming` rustls may see: whole records that it has not discarded yet.
    shown: usize,
    /// How much it has seen in total.
    total: usize,
}

enum Next {
    Again,
    Receive,
    Done,
    Failed(Error),
}

impl<C: Unbuffered> Driver<C> {
    pub(super) fn new(connection: C) -> Self {
        Self { connection, outgoing: Vec::new(), incoming: Vec::new(), shown: 0, total: 0 }
    }

    /// Goes as far as it can with what has been received.
    pub(super) fn advance(&mut self) -> Result<Step, DriverError> {
        loop {
            match self.process() {
                Next::Again => {}
                Next::Done if self.shown == 0 => return Ok(Step::Done),
                Next::Done => return Err(DriverError::Tls(unexpected("a handshake message cut short"))),
                Next::Receive => {
                    if let Some(missing) = self.show_next()? {
                        return Ok(Step::Receive { missing });
                    }
                }
                Next::Failed(error) => {
                    self.collect_alert();
                    return Err(DriverError::Tls(error));
                }
            }
        }
    }

    /// The keys, what derives further ones, and what was received behind the handshake.
    pub(super) fn into_keys(self) -> Result<(ExtractedSecrets, Schedule, Vec<u8>), Error> {
        let (secrets, schedule) = self.connection.into_kernel()?;
        Ok((secrets, schedule, self.incoming))
    }

    fn process(&mut self) -> Next {
        let UnbufferedStatus { discard, state, .. } = self.connection.process(&mut self.incoming[..self.shown]);
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => match encode(&mut data, &mut self.outgoing) {
                Ok(()) => Next::Again,
                Err(e) => Next::Failed(Error::General(e.to_string())),
            },
            // `outgoing` is always sent before anything is received.
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Next::Again
            }
            Ok(ConnectionState::BlockedHandshake) => Next::Receive,
            Ok(ConnectionState::WriteTraffic(_)) => Next::Done,
            Ok(other) => Next::Failed(unexpected(&format!("{other:?}"))),
            Err(error) => Next::Failed(error),
        };
        self.incoming.drain(..discard);
        self.shown -= discard;
        match next {
            // Data could already be sent, but the peer has not proved itself yet.
            Next::Done if self.connection.common().is_handshaking() => Next::Receive,
            next => next,
        }
    }

    /// Shows rustls one more record, or says how many bytes are missing for that.
    fn show_next(&mut self) -> Result<Option<usize>, DriverError> {
        let next = &self.incoming[self.shown..];
        check_header(next, self.total == 0)?;
        let wire = match next {
            [_, _, _, high, low, ..] => HEADER + usize::from(u16::from_be_bytes([*high, *low])),
            _ => return Ok(Some(HEADER - next.len())),
        };
        if wire > MAX_RECORD {
            return Err(DriverError::NotTls(format!("record of {wire} bytes; TLS allows {MAX_RECORD}")));
        }
        if next.len() < wire {
            return Ok(Some(wire - next.len()));
        }
        self.shown += wire;
        self.total += wire;
        if self.total > MAX_HANDSHAKE {
            return Err(DriverError::Tls(unexpected("an endless handshake")));
        }
        Ok(None)
    }

    /// After a failure rustls still hands out the alert it has prepared. As long as there is one it looks at no record, so
    /// the failure is not met twice.
    fn collect_alert(&mut self) {
        while self.connection.common().wants_write() {
            let UnbufferedStatus { state, .. } = self.connection.process(&mut self.incoming[..self.shown]);
            let Ok(ConnectionState::EncodeTlsData(mut data)) = state else { return };
            if encode(&mut data, &mut self.outgoing).is_err() {
                return;
            }
        }
    }
}

fn unexpected(what: &str) -> Error {
    Error::General(format!("unexpected {what} during the handshake"))
}

/// Refuses what cannot be a TLS record at its first wrong byte; the very first one has to be a handshake record.
fn check_header(bytes: &[u8], first: bool) -> Result<(), DriverError> {
    let ok = match bytes {
        [] => true,
        [typ] => content_type(*typ, first),
        [typ, major, ..] => content_type(*typ, first) && *major == 3,
    };
    if ok {
        return Ok(());
    }
    let start: String = bytes.iter().take(16).flat_map(|b| b.escape_ascii()).map(char::from).collect();
    Err(DriverError::NotTls(format!("peer sent \"{start}\", which is not TLS")))
}

fn content_type(typ: u8, first: bool) -> bool {
    if first { matches!(typ, 21 | 22) } else { matches!(typ, 20..=23) }
}

fn encode<D>(data: &mut EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), EncodeError> {
    let old = outgoing.len();
    let needed = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(e)) => e.required_size,
        other => return other.map(mem::drop),
    };
    outgoing.resize(old + needed, 0);
    data.encode(&mut outgoing[old..]).map(mem::drop)
}
