//! `underpass top`: live connections in the terminal.

mod draw;
mod model;
#[cfg(test)]
mod tests;

use std::{
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;
use crossterm::event::{Event, EventStream, KeyEventKind};
use futures_util::StreamExt as _;
use ratatui::DefaultTerminal;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

use self::model::{Model, Sample};
use super::{agent::AgentArgs, connections::FilterArgs, exit::EXIT_CODES_AGENT, show};
use crate::{
    admin::{
        client::{Client, ClientError},
        query::ConnectionQuery,
    },
    relay::ConnectionOrder,
};

/// Connections that are looked at, those with most bytes first.
const LIMIT: u32 = 5000;

/// Arguments of `underpass top`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_AGENT}

Keys: q quits, arrows, PageUp, PageDown, Home and End scroll, s changes the order, Tab
changes between connections and identities, p or space pauses.

Rates are those of the last interval, over the {LIMIT} connections with most bytes. When
the agent stops, the last picture stays and top waits for the agent to come back.

Examples:
  underpass top
  underpass top --workload shop/ --interval 500ms"))]
pub(super) struct TopArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// How often the agent is asked.
    #[arg(long, value_name = "INTERVAL", default_value = "1s", value_parser = show::interval)]
    interval: Duration,
    #[command(flatten)]
    filter: FilterArgs,
}

pub(super) fn top(args: &TopArgs) -> anyhow::Result<()> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        bail!("top needs a terminal; `underpass connections --watch` prints the same for scripts");
    }
    super::runtime::small()?.block_on(run(args))
}

async fn run(args: &TopArgs) -> anyhow::Result<()> {
    let client = args.agent.client();
    let query = args.filter.query(LIMIT, ConnectionOrder::Bytes);
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    // Before the screen is taken: an agent that does not run is an error message, not a picture.
    let mut model = Model::new(sample(client.clone(), query.clone()).await?);
    let mut screen = Screen::take().context("taking over the terminal")?;
    let mut events = EventStream::new();
    let mut tick = interval(args.interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asked: Option<JoinHandle<Result<Sample, ClientError>>> = None;
    loop {
        screen.0.draw(|frame| draw::draw(frame, &mut model)).context("drawing")?;
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) if key.kind != KeyEventKind::Release => {
                    if model.key(key.code, key.modifiers) {
                        return Ok(());
                    }
                }
                Some(Ok(_)) => {} // a resize is drawn
                Some(Err(e)) => return Err(e).context("reading keys"),
                None => return Ok(()),
            },
            _ = tick.tick(), if asked.is_none() && !model.paused => {
                asked = Some(tokio::spawn(sample(client.clone(), query.clone())));
            }
            answer = async { asked.as_mut().expect("checked").await }, if asked.is_some() => {
                asked = None;
                match answer.context("asking the agent")? {
                    Ok(sample) => model.update(sample),
                    Err(e) => model.fail(e.to_string()),
                }
            }
            _ = terminate.recv() => return Ok(()),
        }
    }
}

async fn sample(client: Client, query: ConnectionQuery) -> Result<Sample, ClientError> {
    let status = client.status().await?;
    let counters = client.counters().await?;
    let connections = client.connections(&query).await?;
    Ok(Sample { at: Instant::now(), status, counters, connections })
}

/// The terminal, given back however this ends. A panic gives it back before its message.
struct Screen(DefaultTerminal);

impl Screen {
    fn take() -> io::Result<Self> {
        ratatui::try_init().map(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}
