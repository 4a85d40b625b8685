//! How other threads reach a relay thread.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{Mutex, PoisonError},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{slot::Slot, table::ConnectionId};

/// What can be asked of a relay thread.
pub(super) enum Message {
    /// Take over a connection.
    Adopt(Box<Slot>),
    /// End a connection for the reason noted in its table entry. Unknown numbers are ignored: the connection ended by
    /// itself, or it has not arrived yet and its entry is looked at when it does.
    Close(ConnectionId),
}

#[derive(Default)]
struct State {
    messages: Vec<Message>,
    stopped: bool,
}

/// The messages for one relay thread. Bounded by the connections there are: each is adopted once and, because only the first
/// reason counts, closed at most once.
pub(super) struct Inbox {
    state: Mutex<State>,
    wake: EventFd,
}

impl Inbox {
    pub(super) fn new() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { state: Mutex::default(), wake: EventFd::from_flags(flags)? })
    }

    /// Leaves a message; gives it back when the thread takes no more.
    pub(super) fn send(&self, message: Message) -> Result<(), Message> {
        let first = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.stopped {
                return Err(message);
            }
            state.messages.push(message);
            state.messages.len() == 1
        };
        // Whoever finds messages already waiting knows that the thread is awake or being woken.
        if first {
            self.wake();
        }
        Ok(())
    }

    /// Makes the thread end every connection and return.
    pub(super) fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
        self.wake();
    }

    /// Moves the waiting messages to `into`, which must be empty; `false` once the thread was asked to stop.
    pub(super) fn take(&self, into: &mut Vec<Message>) -> bool {
        // First the event, then the messages: a message sent in between is taken now and its wake-up finds nothing.
        let _ = self.wake.read();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut state.messages, into);
        !state.stopped
    }

    fn wake(&self) {
        // The counter can only refuse at 2^64 - 2 unread wake-ups, in which case the thread is being woken anyway.
        let _ = self.wake.write(1);
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
