//! Listeners that pass from one agent to the next, open all the time: connections that wait in them are lost by nobody.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Captured connections of the pod's own programs.
    Outbound,
    /// Tunnels from peers.
    Tunnel,
    /// Plaintext handed over by the tc program.
    Plaintext,
}

/// Listeners with what they are for.
pub type Sockets = Vec<(Purpose, OwnedFd)>;

/// The listeners in one network namespace.
#[derive(Debug)]
pub struct Listening {
    /// Cookie of the namespace.
    pub netns: u64,
    /// The sockets.
    pub sockets: Sockets,
}

/// Listeners of an agent that was here before, until they are taken up. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Inheritance(Arc<Mutex<HashMap<u64, Sockets>>>);

impl Inheritance {
    /// Adds the listeners of a namespace.
    pub fn add(&self, listening: Listening) {
        self.lock().insert(listening.netns, listening.sockets);
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Closes what nobody has taken up.
    pub fn close(&self) {
        self.lock().clear();
    }

    /// The listeners in a namespace.
    pub fn take(&self, netns: u64) -> Option<Sockets> {
        self.lock().remove(&netns)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Sockets>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
