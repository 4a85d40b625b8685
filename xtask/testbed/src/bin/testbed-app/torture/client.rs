//! The end that connects.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::json;
use socket2::{Domain, SockRef, Socket, Type};
use testbed::torture::{Outcome, Plan, ReadEnd, Report, Scenario, Side};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{
    context::{Common, Context},
    peer,
};
use crate::{name_of, print};

/// `torture drive`.
#[derive(Args)]
pub(crate) struct Drive {
    /// Address to connect to.
    address: SocketAddr,
    /// What to do.
    #[arg(long, value_enum)]
    scenario: Scenario,
    /// From which everything is made.
    #[arg(long)]
    seed: u64,
    /// Number of the first connection.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Make no more connections than this.
    #[arg(long, default_value_t = u64::MAX)]
    count: u64,
    /// Begin no connection later than this, milliseconds.
    #[arg(long, default_value_t = u64::MAX)]
    millis: u64,
    /// Connections at once.
    #[arg(long, default_value_t = 32)]
    concurrency: usize,
    /// Before that, connections that idle all the while (scenario `idle`), with the last numbers there are.
    #[arg(long, default_value_t = 0)]
    idle: u64,
    #[command(flatten)]
    common: Common,
}

/// Idle connections that are opened at a time: each is two handshakes to be done by the agents.
const OPENING: usize = 128;

/// A connection that is over: its plan, what was seen, and what the other end has certainly sent.
type Over = (Box<Plan>, Outcome, u64);

impl Drive {
    pub(super) async fn run(self) -> Result<Report> {
        let context = Arc::new(Context::new(&self.common)?);
        let mut report = Report::default();
        let idle = self.rest(&context, &mut report).await?;
        let (start, most) = (Instant::now(), Duration::from_millis(self.millis));
        let (mut tasks, mut number) = (JoinSet::new(), self.first);
        loop {
            let more = number - self.first < self.count && start.elapsed() < most;
            if more && tasks.len() < self.concurrency {
                tasks.spawn(connect(self.address, Plan::new(self.scenario, self.seed, number), &context, None));
                number += 1;
            } else if let Some(over) = tasks.join_next().await {
                count(&mut report, over??);
            } else {
                break;
            }
        }
        context.released.send_replace(true);
        for over in idle.join_all().await {
            count(&mut report, over?);
        }
        Ok(report)
    }

    /// Opens the idle connections and waits until all of them idle, or have failed.
    async fn rest(&self, context: &Arc<Context>, report: &mut Report) -> Result<JoinSet<Result<Over>>> {
        let places = Arc::new(Semaphore::new(OPENING));
        let mut tasks = JoinSet::new();
        for number in 0..self.idle {
            let place = Arc::clone(&places).acquire_owned().await.context("waiting for a place")?;
            let plan = Plan::new(Scenario::Idle, self.seed, u64::MAX - number);
            tasks.spawn(connect(self.address, plan, context, Some(place)));
        }
        let (mut resting, mut over) = (context.resting.subscribe(), 0);
        loop {
            tokio::select! {
                rested = resting.wait_for(|resting| *resting + over >= self.idle) => {
                    let resting = *rested.context("waiting for idle connections")?;
                    if self.idle > 0 {
                        print(&json!({ "resting": resting }));
                    }
                    break;
                }
                Some(result) = tasks.join_next() => {
                    count(report, result??);
                    over += 1;
                }
            }
        }
        Ok(tasks)
    }
}

fn count(report: &mut Report, (plan, outcome, least): Over) {
    report.add(&plan, Side::Client, &outcome, least);
}

/// A connection from its begin to its end.
fn connect(
    address: SocketAddr,
    plan: Plan,
    context: &Arc<Context>,
    place: Option<OwnedSemaphorePermit>,
) -> impl Future<Output = Result<Over>> + Send + use<> {
    let context = Arc::clone(context);
    async move {
        let stream = match open(address, &plan, &context).await {
            Ok(stream) => stream,
            Err(error) => {
                // A reset may come as early as this, if the other end may reset at all.
                let outcome = Outcome { read_end: ReadEnd::Error(name_of(&error)), ..Outcome::default() };
                return Ok((Box::new(plan), outcome, 0));
            }
        };
        let outcome = peer::run(stream, &plan, Side::Client, &context, place).await?;
        let least = context.known_sent(plan.number, Side::Server)?;
        Ok((Box::new(plan), outcome, least))
    }
}

async fn open(address: SocketAddr, plan: &Plan, context: &Context) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).context("opening a socket")?;
    peer::set_buffers(&SockRef::from(&socket), plan.side(Side::Client).buffers).context("setting buffers")?;
    socket.set_nonblocking(true)?;
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(address);
    let mut stream = peer::within(context, connecting).await?;
    stream.set_nodelay(true)?;
    // Small enough for every buffer. A reset at this moment is the reader's to see.
    let _ = stream.write_all(&plan.header().bytes()).await;
    Ok(stream)
}
