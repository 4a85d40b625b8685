//! Clients of many connections.

use std::{
    collections::BTreeMap,
    io::Read,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Semaphore, task::JoinSet};

use crate::{
    client::{exchange, exchange_and_end, unhex},
    millis, name_of, print,
    sockets::Target,
};

/// `parallel`.
#[derive(Args)]
pub(crate) struct Parallel {
    #[command(flatten)]
    pub(crate) target: Target,
    /// How many connections.
    #[arg(long, default_value_t = 500)]
    count: usize,
    /// How many at once.
    #[arg(long, default_value_t = 100)]
    concurrency: usize,
}

impl Parallel {
    /// `{"ok", "failed", "errors": {name: count}, "slowest_ms", "seconds"}`; a failed connection is a failure of the command.
    pub(crate) async fn run(&self) -> Result<Value> {
        let start = Instant::now();
        let (mut ok, mut slowest, mut errors) = (0_usize, Duration::ZERO, BTreeMap::<String, usize>::new());
        let mut results = open(&self.target, self.count, self.concurrency, |stream, number| async move {
            exchange_and_end(stream, &format!("connection {number}")).await
        });
        while let Some(result) = results.join_next().await {
            match result? {
                Ok((duration, ())) => {
                    ok += 1;
                    slowest = slowest.max(duration);
                }
                Err(error) => *errors.entry(name_of(&error)).or_default() += 1,
            }
        }
        let report = json!({
            "ok": ok, "failed": self.count - ok, "errors": errors,
            "slowest_ms": millis(slowest), "seconds": start.elapsed().as_secs_f64(),
        });
        ensure!(ok == self.count, "not all connections worked: {report}");
        Ok(report)
    }
}

/// `hold`.
#[derive(Args)]
pub(crate) struct Hold {
    #[command(flatten)]
    pub(crate) target: Target,
    /// How many connections.
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// How many handshakes at once.
    #[arg(long, default_value_t = 100)]
    concurrency: usize,
    /// Bytes to send on each, in hexadecimal.
    #[arg(long, default_value = "")]
    send_hex: String,
    /// Exchange a line on each once it is open, and again before it is closed (server in mode `echo`).
    #[arg(long)]
    exchange: bool,
}

impl Hold {
    /// `{"held", "failed", "errors"}` when all have been tried, then, after standard input has closed, `{"alive", "dead", "endings"}`,
    /// where `endings` counts the dead by how they ended: `end` for a clean one, else the error's name.
    ///
    /// Connections that fail are counted, not a failure. The time limit is for the opening only.
    pub(crate) async fn run(&self) -> Result<Value> {
        let bytes: Arc<[u8]> = unhex(&self.send_hex)?.into();
        let talk = self.exchange;
        let mut errors = BTreeMap::<String, usize>::new();
        let mut results = open(&self.target, self.count, self.concurrency, move |mut stream, number| {
            let bytes = Arc::clone(&bytes);
            async move {
                stream.write_all(&bytes).await.context("sending")?;
                if talk {
                    exchange(&mut stream, &format!("opened {number}")).await?;
                }
                Ok(stream)
            }
        });
        let mut held = Vec::with_capacity(self.count);
        let opening = async {
            while let Some(result) = results.join_next().await {
                match result? {
                    Ok((_, stream)) => held.push(stream),
                    Err(error) => *errors.entry(name_of(&error)).or_default() += 1,
                }
            }
            Ok(())
        };
        self.target.within(opening).await?;
        print(&json!({ "held": held.len(), "failed": self.count - held.len(), "errors": errors }));

        let input = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        input.await?.context("waiting for the end of input")?;
        let mut endings = BTreeMap::<String, usize>::new();
        let all = held.len();
        for mut stream in held {
            let mut ending = ending(&stream);
            if talk && ending.is_none() {
                ending = exchange(&mut stream, "closing").await.err().map(|error| name_of(&error));
            }
            if let Some(ending) = ending {
                *endings.entry(ending).or_default() += 1;
            }
        }
        let dead: usize = endings.values().sum();
        Ok(json!({ "alive": all - dead, "dead": dead, "endings": endings }))
    }
}

/// How a connection ended, if it did; what was sent until now is read and forgotten.
fn ending(stream: &TcpStream) -> Option<String> {
    // Past tokio, which only knows of events that its driver has already seen.
    let socket = socket2::SockRef::from(stream);
    let mut buffer = [0; 4096];
    loop {
        match (&*socket).read(&mut buffer) {
            Ok(0) => return Some("end".to_owned()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return None,
            Err(error) => return Some(name_of(&error.into())),
        }
    }
}

/// Running connections; each gives its result and how long it took.
type Tasks<T> = JoinSet<Result<(Duration, T)>>;

/// Opens `count` connections, at most `concurrency` of them at work at a time.
fn open<T, W, F>(target: &Target, count: usize, concurrency: usize, work: W) -> Tasks<T>
where
    W: Fn(TcpStream, usize) -> F + Clone + Send + Sync + 'static,
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send,
{
    let places = Arc::new(Semaphore::new(concurrency));
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let (places, target, work) = (Arc::clone(&places), target.clone(), work.clone());
        tasks.spawn(async move {
            let _place = places.acquire().await.context("waiting for a place")?;
            let begin = Instant::now();
            let result = work(target.connect().await?, number).await?;
            Ok((begin.elapsed(), result))
        });
    }
    tasks
}
