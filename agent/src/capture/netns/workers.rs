//! The threads that enter pods' namespaces.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use tracing::error;

use super::{Namespace, OWN};

/// How many threads: jobs are a few system calls each, and a second thread keeps them moving while one is slow.
const THREADS: usize = 2;
/// How long an idle thread stays in a pod's namespace before it goes home. A thread inside a namespace keeps it alive, so it must
/// not linger; going home after every job would cost a `setns` per job.
const LINGER: Duration = Duration::from_millis(100);

/// What to do in which namespace.
pub(super) struct Job {
    pub namespace: Arc<Namespace>,
    /// Told whether the namespace was entered; must not run inside another one when it was not.
    pub work: Box<dyn FnOnce(io::Result<()>) + Send>,
}

/// The threads' queue. What bounds it is said at [`super::Netns`].
pub(super) struct Workers {
    queue: Mutex<VecDeque<Job>>,
    wake: Condvar,
}

impl Workers {
    /// The process's workers; the first call starts them.
    pub(super) fn shared() -> io::Result<&'static Self> {
        static SHARED: Mutex<Option<&'static Workers>> = Mutex::new(None);
        let mut shared = lock(&SHARED);
        if let Some(workers) = *shared {
            return Ok(workers);
        }
        let workers = Self::start()?;
        *shared = Some(workers);
        Ok(workers)
    }

    /// Starts threads of their own, which run as long as the process.
    pub(super) fn start() -> io::Result<&'static Self> {
        let homes = (0..THREADS).map(|_| File::open(OWN)).collect::<io::Result<Vec<_>>>()?;
        let workers: &'static Self =
            Box::leak(Box::new(Self { queue: Mutex::new(VecDeque::new()), wake: Condvar::new() }));
        let mut started = 0;
        for (number, home) in homes.into_iter().enumerate() {
            match thread::Builder::new().name(format!("netns-{number}")).spawn(move || workers.work(&home)) {
                Ok(_) => started += 1,
                Err(error) if started == 0 => return Err(error),
                Err(error) => error!(%error, started, "fewer namespace worker threads than wanted"),
            }
        }
        Ok(workers)
    }

    pub(super) fn submit(&self, job: Job) {
        lock(&self.queue).push_back(job);
        self.wake.notify_one();
    }

    fn work(&self, home: &File) -> ! {
        // Whoever started the workers may itself have been somewhere else.
        let mut away = setns(home, CloneFlags::CLONE_NEWNET).err().map(|_| 0);
        loop {
            match self.next(away.is_some()) {
                Some(Job { namespace, work }) => {
                    let entered = if away == Some(namespace.cookie) {
                        Ok(())
                    } else {
                        setns(&namespace.file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
                    };
                    if entered.is_ok() {
                        away = Some(namespace.cookie);
                    }
                    drop(namespace);
                    // The work catches its own panics; this is for what runs when its results are dropped.
                    if catch_unwind(AssertUnwindSafe(|| work(entered))).is_err() {
                        error!("a job on a namespace worker thread panicked");
                    }
                }
                None => match setns(home, CloneFlags::CLONE_NEWNET) {
                    Ok(()) => away = None,
                    Err(errno) => error!(%errno, "namespace worker thread cannot return to the agent's namespace"),
                },
            }
        }
    }

    /// The next job; `None` when the thread is away and nothing came for [`LINGER`].
    fn next(&self, away: bool) -> Option<Job> {
        let queue = lock(&self.queue);
        if away {
            let (mut queue, _) = self
                .wake
                .wait_timeout_while(queue, LINGER, |queue| queue.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            queue.pop_front()
        } else {
            let mut queue =
                self.wake.wait_while(queue, |queue| queue.is_empty()).unwrap_or_else(PoisonError::into_inner);
            queue.pop_front()
        }
    }
}

/// No code that can panic runs under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
