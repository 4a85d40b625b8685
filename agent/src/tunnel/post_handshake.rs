//! What happens inside of an established connection besides data: alerts, tickets, key updates (RFC 8446, sections 4.6
//! and 6). It knows the messages and the key schedule, not who protects the records.

use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, HandshakeType, SupportedCipherSuite,
    client::ClientConnectionData, kernel::KernelConnection, server::ServerConnectionData,
};

use super::{alert, config::TICKETS_SENT, records::RecordError};

/// Consecutive records without application data that are put up with; `kMaxKeyUpdates` of other implementations.
const MAX_QUIET_RECORDS: u8 = 32;
/// Largest post-handshake message kept while it is incomplete: a ticket of 2^16-1 bytes with nonce and extensions.
const MAX_HANDSHAKE_MESSAGE: usize = 4 + 0xffff + 512;
/// `KeyUpdateRequest` (RFC 8446, section 4.6.3).
const UPDATE_NOT_REQUESTED: u8 = 0;
/// The sender wants our next keys too.
const UPDATE_REQUESTED: u8 = 1;

/// Announces [`PostHandshake::next_tx`]. The peer need not answer: its own keys age with its own records.
pub(super) const KEY_UPDATE: [u8; 5] = key_update(UPDATE_NOT_REQUESTED);
/// The same, asking for the peer's next keys.
#[cfg(test)]
pub(crate) const REQUESTING_KEY_UPDATE: [u8; 5] = key_update(UPDATE_REQUESTED);

/// RFC 8446, section 4.6.3; the type is `key_update(24)`.
const fn key_update(request: u8) -> [u8; 5] {
    [24, 0, 0, 1, request]
}

/// The key schedule, which also keeps a client's tickets.
pub(super) enum Schedule {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

/// Keys, and the sequence number of the first record under them.
pub(super) type NextKeys = (u64, ConnectionTrafficSecrets);

/// Whose side of the handshake we were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Client,
    Server,
}

impl Schedule {
    fn role(&self) -> Role {
        match self {
            Self::Client(_) => Role::Client,
            Self::Server(_) => Role::Server,
        }
    }

    pub(super) fn suite(&self) -> SupportedCipherSuite {
        match self {
            Self::Client(c) => c.negotiated_cipher_suite(),
            Self::Server(s) => s.negotiated_cipher_suite(),
        }
    }

    fn next_tx(&mut self) -> Result<NextKeys, Error> {
        match self {
            Self::Client(c) => c.update_tx_secret(),
            Self::Server(s) => s.update_tx_secret(),
        }
    }

    fn next_rx(&mut self) -> Result<NextKeys, Error> {
        match self {
            Self::Client(c) => c.update_rx_secret(),
            Self::Server(s) => s.update_rx_secret(),
        }
    }
}

/// What a record meant.
pub(super) enum Received {
    /// Application data.
    Data,
    /// The peer's authenticated end of its direction.
    CloseNotify,
    /// A fatal alert.
    Alert(AlertDescription),
    /// Nothing that anybody else has to know.
    Control,
    /// Whatever the peer sends next is under these keys.
    NextKeys(NextKeys),
}

/// The state of one connection.
pub(super) struct PostHandshake {
    /// Not kept for longer than it can be of use: it is most of what an idle connection costs.
    schedule: Option<Schedule>,
    suite: SupportedCipherSuite,
    role: Role,
    /// The schedule goes behind this many more tickets.
    last_tickets: Option<u8>,
    /// Start of a message that continues in the next record.
    partial: Vec<u8>,
    /// The peer asked for our next keys.
    update_requested: bool,
    /// Records without application data since the last one that had some.
    quiet: u8,
}

impl PostHandshake {
    pub(super) fn new(schedule: Schedule) -> Self {
        let (suite, role) = (schedule.suite(), schedule.role());
        let schedule = Some(schedule);
        Self { schedule, suite, role, last_tickets: None, partial: Vec::new(), update_requested: false, quiet: 0 }
    }

    /// The cipher suite.
    pub(super) fn suite(&self) -> SupportedCipherSuite {
        self.suite
    }

    /// Whoever protects the records cannot replace keys: the schedule is only kept until the server has sent the tickets that ours send.
    pub(super) fn without_updates(mut self) -> Self {
        match self.role {
            Role::Client => self.last_tickets = Some(TICKETS_SENT),
            Role::Server => self.schedule = None,
        }
        self
    }

    /// Whether the peer asked for our next keys.
    pub(super) fn update_requested(&self) -> bool {
        self.update_requested
    }

    /// Our next keys. Nothing may be sent under the old ones but the announcement.
    pub(super) fn next_tx(&mut self) -> Result<NextKeys, Error> {
        let next = self.schedule.as_mut().ok_or_else(|| Error::General("no key schedule".into()))?.next_tx()?;
        self.update_requested = false;
        Ok(next)
    }

    /// Judges a decrypted record.
    pub(super) fn record(&mut self, typ: ContentType, payload: &[u8]) -> Result<Received, RecordError> {
        if typ != ContentType::Handshake && !self.partial.is_empty() {
            // RFC 8446, section 5.1: handshake messages are not interleaved with other records.
            return Err(RecordError::Unexpected);
        }
        let received = match typ {
            ContentType::ApplicationData => Received::Data,
            ContentType::Alert => match alert::decode(payload).ok_or(RecordError::Unexpected)? {
                AlertDescription::CloseNotify => Received::CloseNotify,
                // RFC 8446, section 6.1: a mere announcement; `close_notify` follows.
                AlertDescription::UserCanceled => Received::Control,
                description => Received::Alert(description),
            },
            ContentType::Handshake => self.handshake(payload)?.map_or(Received::Control, Received::NextKeys),
            _ => return Err(RecordError::Unexpected),
        };
        self.count_quiet(&received, payload)?;
        Ok(received)
    }

    /// Takes note of data that was not shown to [`Self::record`].
    pub(super) fn received_data(&mut self) {
        self.quiet = 0;
    }

    /// A peer that keeps us busy without sending anything is not put up with for long.
    fn count_quiet(&mut self, received: &Received, payload: &[u8]) -> Result<(), RecordError> {
        match received {
            Received::Data if !payload.is_empty() => self.quiet = 0,
            Received::Data | Received::Control | Received::NextKeys(_) => self.quiet += 1,
            Received::CloseNotify | Received::Alert(_) => {}
        }
        if self.quiet > MAX_QUIET_RECORDS { Err(RecordError::Unexpected) } else { Ok(()) }
    }

    /// Handshake messages may share a record and may be split over several.
    fn handshake(&mut self, fragment: &[u8]) -> Result<Option<NextKeys>, RecordError> {
        if fragment.is_empty() {
            return Err(RecordError::Unexpected);
        }
        if self.partial.is_empty() {
            let (used, next) = self.messages(fragment)?;
            self.partial.extend_from_slice(&fragment[used..]);
            return Ok(next);
        }
        let mut all = std::mem::take(&mut self.partial);
        all.extend_from_slice(fragment);
        let (used, next) = self.messages(&all)?;
        all.drain(..used);
        self.partial = all;
        Ok(next)
    }

    /// Deals with every complete message; how many bytes they were, and the keys that apply from now on.
    fn messages(&mut self, bytes: &[u8]) -> Result<(usize, Option<NextKeys>), RecordError> {
        let mut rest = bytes;
        let mut next = None;
        while let [typ, a, b, c, tail @ ..] = rest {
            let typ = HandshakeType::from(*typ);
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let allowed = match (&typ, self.role) {
                (HandshakeType::KeyUpdate, _) => length == 1,
                (HandshakeType::NewSessionTicket, Role::Client) => 4 + length <= MAX_HANDSHAKE_MESSAGE,
                _ => false,
            };
            if !allowed {
                return Err(RecordError::Unexpected);
            }
            let Some((payload, after)) = tail.split_at_checked(length) else { break };
            match typ {
                HandshakeType::NewSessionTicket => self.ticket(payload)?,
                // The next byte would be under other keys, so the message has to end its record (RFC 8446, section 5.1).
                _ if after.is_empty() => next = Some(self.peer_updates(payload[0])?),
                _ => return Err(RecordError::Unexpected),
            }
            rest = after;
        }
        Ok((bytes.len() - rest.len(), next))
    }

    /// Keeps a ticket, unless it is one more than expected of a connection that no longer can.
    fn ticket(&mut self, payload: &[u8]) -> Result<(), RecordError> {
        if let Some(Schedule::Client(client)) = &mut self.schedule {
            client.handle_new_session_ticket(payload).map_err(|_| RecordError::Unexpected)?;
        }
        if let Some(last) = &mut self.last_tickets {
            *last = last.saturating_sub(1);
            if *last == 0 {
                self.schedule = None;
            }
        }
        Ok(())
    }

    fn peer_updates(&mut self, request: u8) -> Result<NextKeys, RecordError> {
        self.update_requested |= match request {
            UPDATE_NOT_REQUESTED => false,
            UPDATE_REQUESTED => true,
            _ => return Err(RecordError::Unexpected),
        };
        let schedule = self.schedule.as_mut().ok_or(RecordError::Exhausted)?;
        schedule.next_rx().map_err(|_| RecordError::Exhausted)
    }
}
