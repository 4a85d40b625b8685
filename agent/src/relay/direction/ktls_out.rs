//! From the application into the tunnel, the kernel making the records.

use std::{io::IoSlice, os::fd::AsFd as _};

use super::{Fault, Step};
use crate::{
    relay::{
        buffers::{Held, Scratch},
        socket::{Read, Side},
    },
    tunnel::ktls::KernelTls,
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Reading and writing.
    #[default]
    Open,
    /// The application's end was read.
    Ending,
    /// `close_notify` was sent; TCP may not have it yet.
    Flushing,
    /// FIN was sent.
    Done,
}

/// The direction towards the tunnel.
#[derive(Default)]
pub(in crate::relay) struct KtlsOut {
    phase: Phase,
    held: Held,
}

impl KtlsOut {
    /// Bytes held back.
    pub(in crate::relay) fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether the end of the application's stream was read.
    pub(in crate::relay) fn read_all(&self) -> bool {
        self.phase != Phase::Open
    }

    /// Whether an alert may still be sent.
    pub(in crate::relay) fn is_clear(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Ending)
    }

    /// See the module.
    pub(in crate::relay) fn step(
        &mut self,
        application: &mut Side,
        tunnel: &mut Side,
        tls: &mut KernelTls,
        scratch: &mut Scratch,
    ) -> Result<Step, Fault> {
        if self.held.len() > 0 {
            let held = std::mem::take(&mut self.held);
            let taken = send(held.bytes(), tunnel, tls)?;
            self.held = held.without(taken);
            if self.held.len() > 0 {
                return Ok(Step::Blocked);
            }
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.end(tunnel, tls),
            Phase::Flushing => return self.flush(tunnel, tls),
            Phase::Done => return Ok(Step::Done),
        }
        match application.read(&mut scratch.bytes).map_err(Fault::Read)? {
            // The peer may have asked for new keys.
            Read::Blocked => {
                refresh(tunnel, tls)?;
                Ok(Step::Blocked)
            }
            Read::End => {
                self.phase = Phase::Ending;
                self.end(tunnel, tls)
            }
            Read::Data(length) => {
                let data = &scratch.bytes[..length];
                let taken = send(data, tunnel, tls)?;
                if taken < length {
                    self.held = Held::from(data[taken..].to_vec());
                }
                Ok(Step::Moved(length))
            }
        }
    }

    fn end(&mut self, tunnel: &mut Side, tls: &mut KernelTls) -> Result<Step, Fault> {
        tunnel.cork().map_err(Fault::Write)?;
        if !tunnel.attempt(|socket| tls.send_close_notify(socket)).map_err(Fault::Write)? {
            return Ok(Step::Blocked);
        }
        self.phase = Phase::Flushing;
        self.flush(tunnel, tls)
    }

    fn flush(&mut self, tunnel: &mut Side, tls: &KernelTls) -> Result<Step, Fault> {
        if !tls.is_flushed(tunnel.as_fd()).map_err(Fault::Write)? {
            return Ok(Step::Settling);
        }
        tunnel.finish().map_err(Fault::Write)?;
        self.phase = Phase::Done;
        Ok(Step::Done)
    }
}

/// Sends what the kernel takes, under keys that may still be used.
fn send(data: &[u8], tunnel: &mut Side, tls: &mut KernelTls) -> Result<usize, Fault> {
    let mut done = 0;
    while done < data.len() {
        if !refresh(tunnel, tls)? {
            break;
        }
        let taken = tunnel.write(&[IoSlice::new(&data[done..])]).map_err(Fault::Write)?;
        if taken == 0 {
            break;
        }
        tls.sent(taken);
        done += taken;
    }
    Ok(done)
}

fn refresh(tunnel: &mut Side, tls: &mut KernelTls) -> Result<bool, Fault> {
    tunnel.attempt(|socket| tls.refresh(socket)).map_err(|broken| Fault::kernel(broken, Fault::Write))
}
