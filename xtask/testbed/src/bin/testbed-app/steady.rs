//! A client that opens new connections all the time.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use crate::{client::exchange_and_end, millis, name_of, print, sockets::Target};

/// Connections that may be open at once; a server that hangs must not fill the memory.
const MOST: usize = 20_000;

/// `steady`.
#[derive(Args)]
pub(crate) struct Steady {
    #[command(flatten)]
    pub(crate) target: Target,
    /// New connections per second.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
}

impl Steady {
    /// Each connection is a line there and back and a clean end. `{"first": true}` when the first has worked; when standard input closes,
    /// those that are open are waited for, and `{"ok", "failed", "errors": {name: count}, "slowest_ms", "seconds"}` is the end. The
    /// time limit is for each connection.
    pub(crate) async fn run(&self) -> Result<Value> {
        let start = Instant::now();
        let (mut ok, mut failed, mut slowest) = (0_u64, 0_u64, Duration::ZERO);
        let mut errors = BTreeMap::<String, u64>::new();
        let mut ticks = interval(Duration::from_secs(1) / self.rate);
        // The rate is one of connections, not of a processor that is free.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut input = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        let mut open = JoinSet::new();
        let mut ended = false;
        while !ended || !open.is_empty() {
            tokio::select! {
                _ = ticks.tick(), if !ended && open.len() < MOST => {
                    let target = self.target.clone();
                    open.spawn(async move {
                        let begin = Instant::now();
                        target.within(connection(&target)).await.map(|()| begin.elapsed())
                    });
                }
                Some(result) = open.join_next() => match result? {
                    Ok(duration) => {
                        if ok == 0 {
                            print(&json!({ "first": true }));
                        }
                        ok += 1;
                        slowest = slowest.max(duration);
                    }
                    Err(error) => {
                        failed += 1;
                        *errors.entry(name_of(&error)).or_default() += 1;
                    }
                },
                closed = &mut input, if !ended => {
                    closed?.context("waiting for the end of input")?;
                    ended = true;
                }
            }
        }
        Ok(json!({
            "ok": ok, "failed": failed, "errors": errors,
            "slowest_ms": millis(slowest), "seconds": start.elapsed().as_secs_f64(),
        }))
    }
}

async fn connection(target: &Target) -> Result<()> {
    exchange_and_end(target.connect().await?, "steady").await
}
