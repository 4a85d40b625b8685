//! What top shows, computed from two answers of the agent. No I/O.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use crossterm::event::{KeyCode, KeyModifiers};

use crate::{
    admin::api::{AllCounters, Connections, Status},
    relay::{ConnectionId, ConnectionInfo, DataPath},
};

/// What the agent answered at one moment.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) status: Status,
    pub(super) counters: AllCounters,
    pub(super) connections: Connections,
}

/// Bytes per second, of application data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl Rate {
    pub(super) fn both(self) -> u64 {
        self.sent.saturating_add(self.received)
    }

    fn add(&mut self, other: Self) {
        self.sent = self.sent.saturating_add(other.sent);
        self.received = self.received.saturating_add(other.received);
    }
}

/// A connection and how fast it is.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) info: ConnectionInfo,
    pub(super) rate: Rate,
}

/// Connections between two identities.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) client: Option<String>,
    pub(super) server: Option<String>,
    pub(super) connections: usize,
    pub(super) ktls: usize,
    pub(super) user: usize,
    pub(super) plain: usize,
    pub(super) bytes: u64,
    pub(super) rate: Rate,
}

impl Pair {
    /// Counts connections of that data path.
    pub(super) fn count(&mut self, path: DataPath) {
        self.connections += 1;
        match path {
            DataPath::User => self.user += 1,
            DataPath::Ktls => self.ktls += 1,
            DataPath::Plain => self.plain += 1,
        }
    }
}

/// Which rows come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Rate,
    Bytes,
    Newest,
    Workload,
}

impl Sort {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Bytes => "bytes",
            Self::Newest => "newest",
            Self::Workload => "workload",
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::Rate => Self::Bytes,
            Self::Bytes => Self::Newest,
            Self::Newest => Self::Workload,
            Self::Workload => Self::Rate,
        }
    }
}

/// What the table is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Connections,
    Identities,
}

/// Everything that is drawn.
pub(super) struct Model {
    pub(super) sample: Sample,
    /// Connections in order.
    pub(super) rows: Vec<Row>,
    /// Pairs of identities in order.
    pub(super) pairs: Vec<Pair>,
    /// Over all connections that were listed.
    pub(super) total: Pair,
    /// Tunnels that were set up per second, in both directions.
    pub(super) opened: f64,
    /// Why the picture is old.
    pub(super) error: Option<String>,
    pub(super) sort: Sort,
    pub(super) view: View,
    pub(super) paused: bool,
    /// First row that is shown.
    pub(super) offset: usize,
    /// Rows that fit, as last drawn.
    pub(super) page: usize,
}

impl Model {
    /// Without rates, which need two answers.
    pub(super) fn new(sample: Sample) -> Self {
        let mut model = Self {
            rows: Vec::new(),
            pairs: Vec::new(),
            total: Pair::default(),
            opened: 0.0,
            error: None,
            sort: Sort::Rate,
            view: View::Connections,
            paused: false,
            offset: 0,
            page: 1,
            sample,
        };
        model.arrange(&HashMap::new(), Duration::ZERO);
        model
    }

    /// Takes a new answer over.
    pub(super) fn update(&mut self, sample: Sample) {
        let past = sample.at.saturating_duration_since(self.sample.at);
        let bytes = |c: &ConnectionInfo| (c.id, (c.sent, c.received));
        let before: HashMap<_, _> = self.sample.connections.connections.iter().map(bytes).collect();
        let tunnels = |s: &Sample| s.counters.agent.tunnels_out + s.counters.agent.tunnels_in;
        let opened = tunnels(&sample).saturating_sub(tunnels(&self.sample));
        self.opened = per_second(opened, past);
        self.sample = sample;
        self.error = None;
        self.arrange(&before, past);
    }

    /// Keeps the old picture and says why.
    pub(super) fn fail(&mut self, error: String) {
        self.error = Some(error);
    }

    /// A key was pressed; true: the end.
    pub(super) fn key(&mut self, code: KeyCode, modifiers: KeyModifiers) -> bool {
        match code {
            KeyCode::Char('c' | 'd') if modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('s') => {
                self.sort = self.sort.next();
                self.order();
            }
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Tab => {
                self.view = match self.view {
                    View::Connections => View::Identities,
                    View::Identities => View::Connections,
                };
                self.offset = 0;
            }
            KeyCode::Down | KeyCode::Char('j') => self.offset += 1,
            KeyCode::Up | KeyCode::Char('k') => self.offset = self.offset.saturating_sub(1),
            KeyCode::PageDown => self.offset += self.page,
            KeyCode::PageUp => self.offset = self.offset.saturating_sub(self.page),
            KeyCode::Home => self.offset = 0,
            KeyCode::End => self.offset = self.len(),
            _ => {}
        }
        self.offset = self.offset.min(self.len().saturating_sub(1));
        false
    }

    /// Rows of the table.
    pub(super) fn len(&self) -> usize {
        match self.view {
            View::Connections => self.rows.len(),
            View::Identities => self.pairs.len(),
        }
    }

    fn arrange(&mut self, before: &HashMap<ConnectionId, (u64, u64)>, past: Duration) {
        let rate = |c: &ConnectionInfo| match before.get(&c.id) {
            Some((sent, received)) => Rate {
                sent: whole(per_second(c.sent.saturating_sub(*sent), past)),
                received: whole(per_second(c.received.saturating_sub(*received), past)),
            },
            // One that is younger than the interval moved all its bytes in it; an older one is only new in the list.
            None if c.age_s <= past.as_secs_f64() => {
                Rate { sent: whole(per_second(c.sent, past)), received: whole(per_second(c.received, past)) }
            }
            None => Rate::default(),
        };
        let connections = &self.sample.connections.connections;
        self.rows = connections.iter().map(|c| Row { rate: rate(c), info: c.clone() }).collect();
        let mut pairs: BTreeMap<(Option<&str>, Option<&str>), Pair> = BTreeMap::new();
        self.total = Pair::default();
        for Row { info, rate } in &self.rows {
            let key = (info.source_identity.as_deref(), info.destination_identity.as_deref());
            let pair = pairs.entry(key).or_insert_with(|| Pair {
                client: info.source_identity.clone(),
                server: info.destination_identity.clone(),
                ..Pair::default()
            });
            for sum in [pair, &mut self.total] {
                sum.count(info.data_path);
                sum.bytes = sum.bytes.saturating_add(info.sent).saturating_add(info.received);
                sum.rate.add(*rate);
            }
        }
        self.pairs = pairs.into_values().collect();
        self.order();
        self.offset = self.offset.min(self.len().saturating_sub(1));
    }

    /// Ties go by number, so that rows do not dance.
    fn order(&mut self) {
        let bytes = |c: &ConnectionInfo| c.sent.saturating_add(c.received);
        match self.sort {
            Sort::Rate => self.rows.sort_by_key(|r| (Reverse(r.rate.both()), r.info.id)),
            Sort::Bytes => self.rows.sort_by_key(|r| (Reverse(bytes(&r.info)), r.info.id)),
            Sort::Newest => self.rows.sort_by_key(|r| Reverse(r.info.id)),
            Sort::Workload => {
                self.rows.sort_by(|a, b| (&a.info.workload, a.info.id).cmp(&(&b.info.workload, b.info.id)));
            }
        }
        match self.sort {
            Sort::Rate => {
                self.pairs.sort_by(|a, b| b.rate.both().cmp(&a.rate.both()).then_with(|| names(a).cmp(&names(b))));
            }
            Sort::Bytes => self.pairs.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| names(a).cmp(&names(b)))),
            Sort::Newest | Sort::Workload => self.pairs.sort_by(|a, b| names(a).cmp(&names(b))),
        }
    }
}

fn names(p: &Pair) -> (Option<&str>, Option<&str>) {
    (p.client.as_deref(), p.server.as_deref())
}

#[allow(clippy::cast_precision_loss)] // shown with two digits
fn per_second(n: u64, past: Duration) -> f64 {
    let seconds = past.as_secs_f64();
    if seconds > 0.0 { n as f64 / seconds } else { 0.0 }
}

#[allow(clippy::cast_sign_loss)] // rates are not negative, and `as` saturates
fn whole(rate: f64) -> u64 {
    rate.round() as u64
}
