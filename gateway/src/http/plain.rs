//! A socket without TLS, to which bytes that are mapped from a file go by `sendfile`: the kernel sends the page cache's own pages, where
//! a write of the same memory would copy them first.

use engine::{Behind, behind};
use rustix::io::Errno;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

/// The socket.
pub(super) struct Plain(TcpStream);

impl Plain {
    pub(super) fn new(socket: TcpStream) -> Self {
        Self(socket)
    }

    /// Sends from the file what is behind `bytes`; none where the kernel cannot.
    fn poll_send(&self, bytes: &[u8], behind: &Behind, cx: &mut Context<'_>) -> Poll<Option<io::Result<usize>>> {
        loop {
            if let Err(error) = ready!(self.0.poll_write_ready(cx)) {
                return Poll::Ready(Some(Err(error)));
            }
            let send = || {
                let mut offset = behind.offset;
                let send = || rustix::fs::sendfile(&self.0, &*behind.file, Some(&mut offset), bytes.len());
                rustix::io::retry_on_intr(send).map_err(io::Error::from)
            };
            return Poll::Ready(match self.0.try_io(Interest::WRITABLE, send) {
                // The file is shorter than what is mapped of it: somebody else has cut it.
                Ok(0) => Some(Err(io::ErrorKind::UnexpectedEof.into())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error)
                    if matches!(Errno::from_io_error(&error), Some(Errno::INVAL | Errno::NOSYS | Errno::PERM)) =>
                {
                    None
                }
                sent => Some(sent),
            });
        }
    }
}

impl AsyncRead for Plain {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Plain {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(behind) = behind(bytes)
            && let Some(sent) = ready!(self.poll_send(bytes, &behind, cx))
        {
            return Poll::Ready(sent);
        }
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    /// One file, or all that stands before the first.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = parts.iter().position(|part| !part.is_empty()).unwrap_or(0);
        let Some(part) = parts.get(first) else { return Poll::Ready(Ok(0)) };
        if behind(part).is_some() {
            return self.poll_write(cx, part);
        }
        let rest = &parts[first..];
        let memory = rest.iter().take_while(|part| behind(part).is_none()).count();
        Pin::new(&mut self.0).poll_write_vectored(cx, &rest[..memory])
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::tests::{content, digest_of, engine_config};
    use peer_proto::Algorithm;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    #[tokio::test]
    async fn mapped_bytes_go_by_the_file_and_all_others_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine::start(engine_config(dir.path())).unwrap();
        let blob = content(9, (5 << 20) + 77);
        let mut upload = engine.upload(Algorithm::Sha256, None).await.unwrap();
        upload.write(0, blob.clone()).await.unwrap();
        upload.commit(&digest_of(&blob)).await.unwrap();
        let mut reader = engine.read(&digest_of(&blob), 10..blob.len() as u64).await.unwrap();
        reader.unseen();
        let (mut mapped, mut expected) = (Vec::new(), Vec::new());
        while let Some(bytes) = reader.next().await {
            mapped.push(bytes.unwrap());
        }
        assert!(mapped.iter().all(|bytes| behind(bytes).is_some()), "just written, so in memory");

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut server = Plain::new(listener.accept().await.unwrap().0);
        let mut parts: Vec<&[u8]> = vec![b"head", b"", b"and more"];
        parts.extend(mapped.iter().flat_map(|bytes| [&bytes[..], b"between"]));
        parts.extend([&b""[..], &mapped[0][5..6], b"tail"]);
        parts.iter().for_each(|part| expected.extend_from_slice(part));
        let write = async {
            let mut left: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut left = &mut left[..];
            while left.iter().any(|part| !part.is_empty()) {
                let sent = server.write_vectored(left).await.unwrap();
                IoSlice::advance_slices(&mut left, sent);
            }
            server.write_all(&mapped[1]).await.unwrap();
            server.shutdown().await.unwrap();
        };
        expected.extend_from_slice(&mapped[1]);
        let read = async {
            let (mut client, mut got) = (client, Vec::new());
            client.read_to_end(&mut got).await.unwrap();
            got
        };
        let ((), got) = tokio::join!(write, read);
        assert!(got == expected);

        // A file that somebody cut is an error, and no crash.
        let file = behind(&mapped[2]).unwrap();
        let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*file.file));
        std::fs::File::options().write(true).open(name).unwrap().set_len(100).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut server = Plain::new(listener.accept().await.unwrap().0);
        assert_eq!(server.write(&mapped[2]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
