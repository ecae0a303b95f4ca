//! The thread that closes long files. With the last descriptor or mapping of a deleted file its space is freed, which takes a file system
//! milliseconds for each GB, and longer where it tells the disk so (`discard`): whoever happens to be the last to hold on to a
//! blob, a shard most often, is not to wait for that.

use std::{
    convert::Infallible,
    fmt, io,
    ops::Deref,
    sync::mpsc::{self, SyncSender, TrySendError},
    thread,
};

/// Values that wait to be closed at most; beyond that whoever lets go of one closes it.
const WAITING_MAX: usize = 4096;
/// Files and mappings below this many bytes are closed on the spot, which is quicker than waking a thread.
pub(crate) const SHORT: u64 = 1 << 20;

/// The thread's queue. It ends with the last clone.
#[derive(Clone, Debug)]
pub(crate) struct Closer(SyncSender<Box<dyn Send>>);

impl Closer {
    pub(crate) fn start() -> io::Result<Self> {
        let (sender, waiting) = mpsc::sync_channel::<Box<dyn Send>>(WAITING_MAX);
        thread::Builder::new().name("shoal-close".to_owned()).spawn(move || waiting.into_iter().for_each(drop))?;
        Ok(Self(sender))
    }

    /// Wraps what is to be closed on that thread.
    pub(crate) fn watch<T: Send + 'static>(&self, value: T, is_long: fn(&T) -> bool) -> Closing<T> {
        Closing { value: Some(value), is_long, closer: self.clone() }
    }

    /// Waits until all that was let go so far is closed.
    pub(crate) fn settle(&self) {
        let (last, closed) = mpsc::channel::<Infallible>();
        if self.0.send(Box::new(last)).is_ok() {
            // Nothing is ever sent: the wait ends when the sender is closed.
            let _ = closed.recv();
        }
    }
}

/// A value that is dropped on the thread that closes, where it is long.
pub(crate) struct Closing<T: Send + 'static> {
    /// None only while it is dropped.
    value: Option<T>,
    is_long: fn(&T) -> bool,
    closer: Closer,
}

impl<T: Send> Deref for Closing<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("there until it is dropped")
    }
}

impl<T: Send> Drop for Closing<T> {
    fn drop(&mut self) {
        let Some(value) = self.value.take().filter(self.is_long) else { return };
        match self.closer.0.try_send(Box::new(value)) {
            Ok(()) => {}
            Err(TrySendError::Full(value) | TrySendError::Disconnected(value)) => drop(value),
        }
    }
}

impl<T: Send + fmt::Debug> fmt::Debug for Closing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says where it was dropped.
    struct Told(SyncSender<Option<String>>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(thread::current().name().map(str::to_owned)).unwrap();
        }
    }

    #[test]
    fn only_what_is_long_is_closed_by_the_thread() {
        let (sender, told) = mpsc::sync_channel(1);
        let closer = Closer::start().unwrap();
        drop(closer.watch(Told(sender.clone()), |_| true));
        assert_eq!(told.recv().unwrap().as_deref(), Some("shoal-close"));
        let two = mpsc::sync_channel(2);
        for _ in 0..2 {
            drop(closer.watch(Told(two.0.clone()), |_| true));
        }
        closer.settle();
        assert_eq!(two.1.try_iter().count(), 2);
        drop(closer.watch(Told(sender), |_| false));
        assert_eq!(told.recv().unwrap().as_deref(), thread::current().name());
    }
}
