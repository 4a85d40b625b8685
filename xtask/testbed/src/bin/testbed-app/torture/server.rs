//! The end that is connected to.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::json;
use socket2::SockRef;
use testbed::torture::{Failure, Header, Outcome, Plan, Report, Side};
use tokio::{io::AsyncReadExt, net::TcpStream, task::JoinSet};

use super::{
    context::{Common, Context},
    peer,
};
use crate::{name_of, print, server::listen};

/// `torture serve`.
#[derive(Args)]
pub(crate) struct Serve {
    /// Address to listen on; `[::]:PORT` takes IPv4 too.
    listen: SocketAddr,
    #[command(flatten)]
    common: Common,
}

/// A connection that is over.
enum Over {
    /// With its plan, what was seen, and what the other end has certainly sent.
    Judged(Box<Plan>, Outcome, u64),
    /// Reset before it told its number.
    Unidentified,
    /// It ended otherwise before that.
    Failed(String),
}

impl Serve {
    pub(super) async fn run(self) -> Result<Report> {
        let context = Arc::new(Context::new(&self.common)?);
        let listener = listen(self.listen)?;
        print(&json!({ "listening": listener.local_addr()? }));
        let mut input = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        let (mut tasks, mut report) = (JoinSet::new(), Report::default());
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted.context("accepting")?;
                    let context = Arc::clone(&context);
                    tasks.spawn(async move { serve(stream, &context).await });
                }
                Some(over) = tasks.join_next() => count(&mut report, over??),
                _ = &mut input => break,
            }
        }
        // Every connection has a limit of time.
        while let Some(over) = tasks.join_next().await {
            count(&mut report, over??);
        }
        Ok(report)
    }
}

fn count(report: &mut Report, over: Over) {
    match over {
        Over::Judged(plan, outcome, least) => report.add(&plan, Side::Server, &outcome, least),
        Over::Unidentified => report.unidentified += 1,
        Over::Failed(what) => report.fail(Failure { number: None, side: Side::Server, what }),
    }
}

async fn serve(mut stream: TcpStream, context: &Context) -> Result<Over> {
    stream.set_nodelay(true)?;
    let mut header = [0; Header::LENGTH];
    if let Err(error) = peer::within(context, stream.read_exact(&mut header)).await {
        let name = name_of(&error);
        // Killed before it could say anything.
        let silent = context.somebody_dies() && name == "other";
        if name == "ECONNRESET" || silent {
            return Ok(Over::Unidentified);
        }
        return Ok(Over::Failed(format!("before the header had come: {error:#}")));
    }
    let plan = match Header::plan(&header) {
        Ok(plan) => plan,
        Err(error) => return Ok(Over::Failed(format!("{error:#}"))),
    };
    // A connection may be reset by now, which its reader will tell.
    let _ = peer::set_buffers(&SockRef::from(&stream), plan.side(Side::Server).buffers);
    let outcome = peer::run(stream, &plan, Side::Server, context, None).await?;
    let least = context.known_sent(plan.number, Side::Client)?;
    Ok(Over::Judged(Box::new(plan), outcome, least))
}
