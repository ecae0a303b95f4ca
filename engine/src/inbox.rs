//! How other threads reach a shard: a bounded queue of commands, a queue of what its jobs came to, and one wake-up for both.
//!
//! A sender puts its message in and then, if no wake-up is under way, writes a byte to a socket that the shard's driver
//! watches like any other. The shard takes the byte first and empties the queues after, so that nothing put in is left lying.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc as std_mpsc,
    },
};
use tokio::sync::mpsc;

/// Commands waiting for a shard at most; who comes then waits, or is told that it is busy.
pub(crate) const COMMANDS_MAX: usize = 4096;

/// The sending end: for any thread. `C` are commands, `D` what jobs came to.
pub(crate) struct Outbox<C, D> {
    commands: mpsc::Sender<C>,
    done: std_mpsc::Sender<D>,
    bell: Arc<Bell>,
}

/// The receiving end: the shard's.
pub(crate) struct Inbox<C, D> {
    commands: mpsc::Receiver<C>,
    done: std_mpsc::Receiver<D>,
    bell: Arc<Bell>,
    watched: UnixStream,
}

/// The queue is full, or the shard is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    Full,
    Gone,
}

struct Bell {
    rung: AtomicBool,
    socket: UnixStream,
}

impl Bell {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // A full pipe wakes as well as a byte more, and a closed one has nobody left to wake.
            let _ = (&self.socket).write(&[1]);
        }
    }
}

/// Both ends of a new inbox.
pub(crate) fn inbox<C, D>() -> std::io::Result<(Outbox<C, D>, Inbox<C, D>)> {
    let (socket, watched) = UnixStream::pair()?;
    socket.set_nonblocking(true)?;
    watched.set_nonblocking(true)?;
    let bell = Arc::new(Bell { rung: AtomicBool::new(false), socket });
    let (commands, commands_in) = mpsc::channel(COMMANDS_MAX);
    let (done, done_in) = std_mpsc::channel();
    let outbox = Outbox { commands, done, bell: bell.clone() };
    Ok((outbox, Inbox { commands: commands_in, done: done_in, bell, watched }))
}

impl<C, D> Clone for Outbox<C, D> {
    fn clone(&self) -> Self {
        Self { commands: self.commands.clone(), done: self.done.clone(), bell: self.bell.clone() }
    }
}

impl<C, D> Outbox<C, D> {
    /// Puts a command in, waiting for room.
    pub(crate) async fn send(&self, command: C) -> Result<(), Refused> {
        self.commands.send(command).await.map_err(|_| Refused::Gone)?;
        self.bell.ring();
        Ok(())
    }

    /// Puts a command in where there is room now.
    pub(crate) fn try_send(&self, command: C) -> Result<(), Refused> {
        self.commands.try_send(command).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => Refused::Full,
            mpsc::error::TrySendError::Closed(_) => Refused::Gone,
        })?;
        self.bell.ring();
        Ok(())
    }

    /// Wakes the receiving end, with or without a message.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    /// Reports a job done. Never refused: a shard bounds the jobs it has under way.
    pub(crate) fn report(&self, done: D) {
        if self.done.send(done).is_ok() {
            self.bell.ring();
        }
    }
}

impl<C, D> Inbox<C, D> {
    /// The socket that turns readable when something lies in the inbox.
    pub(crate) fn watched(&self) -> &UnixStream {
        &self.watched
    }

    /// Takes the wake-up; to be called before [`Self::take`] when the watched socket was readable.
    pub(crate) fn hush(&self) {
        let mut bytes = [0; 16];
        while matches!((&self.watched).read(&mut bytes), Ok(n) if n == bytes.len()) {}
        self.bell.rung.swap(false, Ordering::AcqRel);
    }

    /// The next message: first what jobs came to, for that frees buffers, then commands.
    pub(crate) fn take(&mut self) -> Option<Message<C, D>> {
        if let Ok(done) = self.done.try_recv() {
            return Some(Message::Done(done));
        }
        self.commands.try_recv().ok().map(Message::Command)
    }
}

/// What lies in an inbox.
#[derive(Debug)]
pub(crate) enum Message<C, D> {
    Command(C),
    Done(D),
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn nothing_put_in_from_many_threads_is_left_lying() {
        let (outbox, mut inbox) = inbox::<u64, u64>().unwrap();
        let (threads, each) = (4, 5_000);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let outbox = outbox.clone();
                scope.spawn(move || {
                    for n in 0..each {
                        outbox.report(n);
                        while outbox.try_send(n) == Err(Refused::Full) {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let (mut commands, mut done) = (0, 0);
            while commands + done < 2 * threads * each {
                let patience = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
                let ready = poll(&mut [PollFd::new(inbox.watched(), PollFlags::IN)], Some(&patience)).unwrap();
                assert_eq!(ready, 1, "no wake-up with {commands} commands and {done} outcomes taken");
                inbox.hush();
                while let Some(message) = inbox.take() {
                    match message {
                        Message::Command(_) => commands += 1,
                        Message::Done(_) => done += 1,
                    }
                }
            }
            assert_eq!((commands, done), (threads * each, threads * each));
        });
    }

    #[test]
    fn a_full_inbox_says_so() {
        let (outbox, mut inbox) = inbox::<usize, ()>().unwrap();
        for n in 0..COMMANDS_MAX {
            outbox.try_send(n).unwrap();
        }
        assert_eq!(outbox.try_send(0), Err(Refused::Full));
        assert!(matches!(inbox.take(), Some(Message::Command(0))));
        outbox.try_send(0).unwrap();
        drop(inbox);
        assert_eq!(outbox.try_send(0), Err(Refused::Gone));
    }
}
