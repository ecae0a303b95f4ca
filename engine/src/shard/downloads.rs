//! Downloads from the first peer to the last piece: begun, carried on as the swarm wants, ended.

use super::{
    Alarm, Core, DOWNLOADS_MAX, PROGRESS_NOTICE, Pending, Phase,
    command::{Answer, Command, Extent, Message, Reply},
    download::{Download, WAITERS_MAX, Wait},
    link::Link,
    piece_set, progress, swarm_class,
};
use crate::{
    driver::Effect,
    handle::{Active, Class, Error, Notice, Peer},
    job::Job,
    limit,
    store::{self, Blob},
};
use peer_proto::{
    Digest, Instant, Layout, Namespace,
    conn::{self, CommandError},
    swarm::{self, Candidate, Slot, Swarm},
    wire::Farewell,
};
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

impl Core {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Download { namespace, layout, class, extent, reply } => {
                self.download(namespace, layout, class, extent, reply);
            }
            Command::Wait { digest, reply } => match self.downloads.get_mut(&digest) {
                Some(download) if download.waiters.len() < WAITERS_MAX => download.waiters.push(reply),
                Some(_) => self.answer(reply, Err(Error::Busy("list of waiters"))),
                None => self.answer(reply, Err(Error::NotFound(digest))),
            },
            Command::Forget { digest, reply } => {
                let here = self.downloads.contains_key(&digest);
                self.forget(&digest);
                self.effects.push_back(Effect::Answer(Answer::Bool(reply, Ok(here))));
            }
            Command::Peers { digest, peers } => self.named(digest, peers),
            Command::Read { digest, range, alive, reply } => {
                let reading = self.reader(digest, range, alive);
                self.effects.push_back(Effect::Answer(Answer::Reading(reply, reading)));
            }
            Command::Await { digest, reader, piece, all, patience, reply } => {
                self.wait_for(digest, reader, Wait { piece, all, since: self.now, patience, reply });
            }
            Command::Supplied { digest, piece, bytes } => self.supplied(digest, piece, &bytes),
            Command::Told(message) => self.told(message),
            Command::Probe { reply } => self.effects.push_back(Effect::Answer(Answer::Alive(reply))),
            Command::Stop { drain } => self.stop(drain),
            // Made an event of its own by the driver, which owns the socket.
            Command::Adopt { .. } => {}
        }
    }

    pub(super) fn answer(&mut self, reply: Reply<()>, result: Result<(), Error>) {
        self.effects.push_back(Effect::Answer(Answer::Unit(reply, result)));
    }

    pub(super) fn told(&mut self, message: Message) {
        match message {
            Message::Watch { digest, shard } => {
                if let Some(download) = self.downloads.get_mut(&digest) {
                    download.watchers.insert(shard);
                }
                // What came before it watched.
                self.effects.push_back(Effect::Tell { to: shard, message: Message::Progress { digest } });
            }
            Message::Progress { digest } => self.announce(&digest),
        }
    }

    pub(super) fn download(
        &mut self,
        namespace: Namespace,
        layout: Arc<Layout>,
        class: Class,
        extent: Extent,
        reply: Reply<()>,
    ) {
        let digest = *layout.digest();
        if self.phase != Phase::Running {
            return self.answer(reply, Err(Error::Closed));
        }
        if let Some(download) = self.downloads.get_mut(&digest) {
            if *download.layout != *layout {
                return self.answer(reply, Err(Error::LayoutDiffers(digest)));
            }
            download.class = download.class.max(class);
            if extent == Extent::Whole {
                download.extent = extent;
            }
            match &mut download.swarm {
                Some(swarm) => {
                    swarm.handle(self.now, swarm::Event::Class(swarm_class(download.class)));
                    if extent == Extent::Whole {
                        swarm.handle(self.now, swarm::Event::Whole);
                    }
                    // Whoever asks again has the layout from somewhere: it is right, whatever two peers say.
                    if std::mem::take(&mut download.suspect) {
                        swarm.handle(self.now, swarm::Event::LayoutHolds);
                    }
                    self.answer(reply, Ok(()));
                }
                None if download.beginners.len() < WAITERS_MAX => download.beginners.push(reply),
                None => self.answer(reply, Err(Error::Busy("list of waiters"))),
            }
            return self.touch_download(digest);
        }
        if self.downloads.len() >= DOWNLOADS_MAX {
            return self.answer(reply, Err(Error::Busy("table of downloads")));
        }
        // The tracker is asked for peers while the disk makes room: whoever downloads wants them, whatever of it is here.
        let degree = swarm::Config::new(self.setup.id, 0).degree;
        let want = if extent == Extent::Whole { degree } else { degree.min(swarm::RANGES_DEGREE) };
        let (pieces, state) = (layout.geometry().pieces(), Active::Leeching { want });
        self.setup.notices.put(Notice { digest, namespace: namespace.clone(), have: 0, pieces, state });
        let mut download = Download::new(namespace.clone(), layout.clone(), class, extent);
        download.beginners.push(reply);
        self.downloads.insert(digest, download);
        self.setup.active.fetch_add(1, Ordering::Relaxed);
        self.count_downloads();
        self.submit(Pending::Begin(digest), Job::Begin { layout, namespace });
    }

    pub(super) fn count_downloads(&mut self) {
        self.setup.stats.downloads.set(self.downloads.len());
        let in_flight = swarm::share(self.setup.active.load(Ordering::Relaxed));
        if std::mem::replace(&mut self.share, in_flight) == in_flight {
            return;
        }
        let digests: Vec<Digest> = self.downloads.keys().copied().collect();
        for digest in digests {
            self.tell_swarm(&digest, Some(swarm::Event::Budget { in_flight }));
        }
    }

    /// Space is set aside, or there is none.
    pub(super) fn begun(&mut self, digest: Digest, result: Result<Arc<Blob>, store::Error>) {
        let blob = match result {
            Ok(blob) => blob,
            Err(error) => {
                self.fail(&digest, &error.into());
                return self.answer_offers(&digest);
            }
        };
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        if blob.is_whole() {
            self.share(blob);
            self.whole(digest);
            return self.answer_offers(&digest);
        }
        let mut config = swarm::Config::new(self.setup.id, self.setup.seed ^ self.next_id);
        config.accept_max = config.accept_max.max(config.degree);
        let geometry = blob.layout().geometry();
        let make = match download.extent {
            Extent::Whole => Swarm::new,
            Extent::Ranges => Swarm::of_ranges,
        };
        let mut swarm = make(config, geometry, piece_set(&blob), swarm_class(download.class));
        download.busy = self.now;
        swarm.handle(
            self.now,
            swarm::Event::Budget { in_flight: swarm::share(self.setup.active.load(Ordering::Relaxed)) },
        );
        let named = std::mem::take(&mut download.named);
        download.swarm = Some(swarm);
        let beginners = std::mem::take(&mut download.beginners);
        self.share(blob);
        for reply in beginners {
            self.answer(reply, Ok(()));
        }
        // Channels on which it was served before it was wanted.
        let lanes = self.blobs.get(&digest).map(|shared| shared.lanes.clone()).unwrap_or_default();
        for slot in lanes {
            let Some((socket, channel)) = self.slots.get(&slot).copied() else { continue };
            self.with_link(socket, |core, link| {
                if link.lanes.get(&channel).is_some_and(|lane| lane.open) {
                    core.introduce(link, channel);
                }
            });
        }
        self.answer_offers(&digest);
        self.named(digest, named);
        self.notice(&digest);
        self.touch_download(digest);
    }

    pub(super) fn named(&mut self, digest: Digest, peers: Vec<Peer>) {
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        let Some(swarm) = &mut download.swarm else {
            download.named = peers;
            return;
        };
        let now = self.now;
        let candidates: Vec<Candidate> = peers
            .into_iter()
            .filter(|peer| self.bans.get(&peer.id).is_none_or(|until| *until <= now))
            .map(|Peer { id, addr, origin }| Candidate { id, addr, origin })
            .collect();
        swarm.handle(now, swarm::Event::Candidates(&candidates));
        self.touch_download(digest);
    }

    pub(super) fn touch_download(&mut self, digest: Digest) {
        if let Some(download) = self.downloads.get_mut(&digest)
            && !download.dirty
        {
            download.dirty = true;
            self.dirty_downloads.push_back(digest);
        }
    }

    pub(super) fn tell_swarm(&mut self, digest: &Digest, event: Option<swarm::Event<'_>>) {
        if let Some((swarm, event)) =
            self.downloads.get_mut(digest).and_then(|download| download.swarm.as_mut()).zip(event)
        {
            swarm.handle(self.now, event);
            self.touch_download(*digest);
        }
    }

    pub(super) fn download_alarm(&mut self, digest: Digest) {
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        download.alarm = None;
        if let Some(swarm) = &mut download.swarm {
            swarm.handle(self.now, swarm::Event::Tick);
        }
        self.effects.extend(download.expire(self.now).into_iter().map(Effect::Answer));
        self.touch_download(digest);
    }

    pub(super) fn settle_download(&mut self, digest: Digest) {
        if let Some(download) = self.downloads.get_mut(&digest) {
            download.dirty = false;
            download.prune(self.now);
            if download.is_over(self.now) {
                return self.retire(&digest);
            }
        }
        while let Some(effect) = self.downloads.get_mut(&digest).and_then(|download| download.swarm.as_mut()?.poll()) {
            self.swarm_wants(digest, effect);
        }
        let Some(download) = self.downloads.get_mut(&digest) else { return };
        let due = download.deadline();
        if due != download.alarm {
            if let Some(old) = std::mem::replace(&mut download.alarm, due) {
                self.alarms.remove(&(old, Alarm::Download(digest)));
            }
            self.alarms.extend(due.map(|at| (at, Alarm::Download(digest))));
        }
        if self.now.since(download.told) >= PROGRESS_NOTICE {
            self.notice(&digest);
        }
    }

    pub(super) fn swarm_wants(&mut self, digest: Digest, effect: swarm::Effect) {
        use swarm::Effect as Wants;
        match effect {
            Wants::Connect(candidate) => self.connect(digest, candidate),
            Wants::Request { slot, piece } => {
                let class = self.downloads.get(&digest).map_or(Class::Background, |download| download.class);
                self.in_queues[usize::from(class == Class::Background)].push_back((slot, piece));
                self.grant_in();
            }
            Wants::Cancel { slot, piece } => {
                for queue in &mut self.in_queues {
                    queue.retain(|queued| *queued != (slot, piece));
                }
                if let Some((socket, channel)) = self.slots.get(&slot).copied()
                    && let Some(link) = self.links.get_mut(&socket)
                {
                    link.asks.retain(|ask| *ask != (channel, piece));
                    link.conn.handle(self.now, conn::Event::Cancel { channel, piece });
                    self.touch(socket);
                }
            }
            Wants::Drop { slot } => self.close_lane(slot),
            Wants::Ban { slot, id, reason } => {
                tracing::warn!(%digest, peer = %id, ?reason, "peer banned");
                self.ban(id);
                self.close_lane(slot);
                for socket in self.peers.get(&id).cloned().unwrap_or_default() {
                    if let Some(link) = self.links.get_mut(&socket) {
                        link.conn.handle(self.now, conn::Event::Goodbye(Farewell::Banned));
                        self.touch(socket);
                    }
                }
            }
            Wants::SuspectLayout { piece } => {
                self.setup.stats.suspect_layouts.add(1);
                tracing::warn!(%digest, %piece, "two peers failed one piece: the layout may be wrong");
                let Some(download) = self.downloads.get_mut(&digest) else { return };
                download.suspect = true;
                for reply in std::mem::take(&mut download.waiters) {
                    self.answer(reply, Err(Error::Suspect(digest)));
                }
            }
            Wants::WantPeers(_) => self.notice(&digest),
            Wants::Complete => {
                if let Some(shared) = self.blobs.get(&digest) {
                    let job = Job::Finish { blob: shared.blob.clone() };
                    self.submit(Pending::Finish(digest), job);
                }
            }
        }
    }

    pub(super) fn connect(&mut self, digest: Digest, candidate: Candidate) {
        let banned = self.bans.get(&candidate.id).is_some_and(|until| *until > self.now);
        if !banned {
            if let Some(id) = self.connection_to(&candidate.id) {
                self.with_link(id, |core, link| core.open_lane(link, &digest));
                return self.touch(id);
            }
            if let Some(link) = self.dialling.get(&candidate.id).and_then(|id| self.links.get_mut(id)) {
                return link.waiting.push(digest);
            }
            if self.dial(digest, candidate) {
                return;
            }
        }
        self.tell_swarm(&digest, Some(swarm::Event::Failed { id: candidate.id }));
    }

    pub(super) fn close_lane(&mut self, slot: Slot) {
        let Some((socket, channel)) = self.slots.get(&slot).copied() else { return };
        self.with_link(socket, |core, link| {
            link.conn.handle(core.now, conn::Event::Close { channel });
            core.remove_lane(link, channel);
        });
        self.touch(socket);
    }

    /// Lets requests out as the limits for receiving allow: those that a client waits for first. One that only its peer's limit
    /// holds up is overtaken.
    pub(super) fn grant_in(&mut self) {
        let meters = self.setup.meters.clone();
        let mut again: Option<Instant> = None;
        for (queue, class) in [Class::Foreground, Class::Background].into_iter().enumerate() {
            let all = [meters.inward.as_ref(), meters.class(class)];
            let mut waiting = std::mem::take(&mut self.in_queues[queue]);
            let mut overtaken = VecDeque::new();
            while let Some((slot, piece)) = waiting.front().copied() {
                if let Err(at) = limit::take(all, self.now, 0) {
                    again = Some(again.map_or(at, |earlier| earlier.min(at)));
                    break;
                }
                waiting.pop_front();
                let Some((socket, channel)) = self.slots.get(&slot).copied() else { continue };
                let Some(link) = self.links.get_mut(&socket) else { continue };
                let Some(lane) = link.lanes.get(&channel) else { continue };
                let geometry = self.blobs.get(&lane.digest).map(|shared| shared.blob.layout().geometry());
                let bytes = geometry.map_or(0, |geometry| u64::from(geometry.piece_len(piece)));
                let own = link.meter.as_ref().and_then(|meter| meter.inward.as_ref());
                match limit::take([all[0], all[1], own], self.now, bytes) {
                    Ok(()) => {
                        link.conn.handle(self.now, conn::Event::Class { channel, class: swarm_class(class) });
                        link.asks.push_back((channel, piece));
                        self.touch(socket);
                    }
                    Err(at) => {
                        overtaken.push_back((slot, piece));
                        again = Some(again.map_or(at, |earlier| earlier.min(at)));
                    }
                }
            }
            overtaken.append(&mut waiting);
            self.in_queues[queue] = overtaken;
        }
        self.in_alarm = again;
    }

    /// Makes the requests that the connection's window has room for.
    pub(super) fn ask_again(&mut self, link: &mut Link) {
        let mut later = VecDeque::new();
        while let Some((channel, piece)) = link.asks.pop_front() {
            match link.conn.request(self.now, channel, piece) {
                Ok(()) => {}
                Err(CommandError::Full) => {
                    link.asks.push_front((channel, piece));
                    break;
                }
                // Its cancelled request must be answered first.
                Err(CommandError::Twice) => later.push_back((channel, piece)),
                // The download is told when the channel goes.
                Err(CommandError::NotOpen) => {}
            }
        }
        link.asks.append(&mut later);
    }

    /// Every piece is proven, on disk and under its name.
    pub(super) fn finished(&mut self, digest: Digest, result: Result<Arc<Blob>, store::Error>) {
        match result {
            Ok(blob) => {
                self.share(blob);
                self.whole(digest);
            }
            Err(error) => self.fail(&digest, &error.into()),
        }
    }

    pub(super) fn whole(&mut self, digest: Digest) {
        let Some(mut download) = self.remove_download(&digest) else { return };
        self.setup.stats.downloads_done.add(1);
        let waits = download.readers.values_mut().filter_map(|reader| reader.wait.take());
        self.effects.extend(waits.map(|wait| Effect::Answer(Answer::Bytes(wait.reply, Ok(None)))));
        for reply in download.beginners.drain(..).chain(download.waiters.drain(..)).collect::<Vec<_>>() {
            self.answer(reply, Ok(()));
        }
        let pieces = download.layout.geometry().pieces();
        let namespace = download.namespace;
        self.setup.notices.put(Notice { digest, namespace, have: pieces, pieces, state: Active::Seeding });
        self.announce(&digest);
        self.forget_unused(&digest);
    }

    pub(super) fn remove_download(&mut self, digest: &Digest) -> Option<Download> {
        let download = self.downloads.remove(digest)?;
        if let Some(at) = download.alarm {
            self.alarms.remove(&(at, Alarm::Download(*digest)));
        }
        self.setup.active.fetch_sub(1, Ordering::Relaxed);
        self.count_downloads();
        Some(download)
    }

    /// A download ends without its blob.
    pub(super) fn fail(&mut self, digest: &Digest, error: &Error) {
        let Some(download) = self.remove_download(digest) else { return };
        if !matches!(error, Error::Stopped(_) | Error::Closed) {
            tracing::warn!(%digest, %error, "download given up");
        }
        self.setup.stats.downloads_failed.add(1);
        let (have, pieces) = progress(&download);
        let namespace = download.namespace.clone();
        self.setup.notices.put(Notice { digest: *digest, namespace, have, pieces, state: Active::Gone });
        self.effects.extend(download.give_up(error).into_iter().map(Effect::Answer));
        self.forget_unused(digest);
    }

    /// The blob is to be deleted: nobody here may hold on to it.
    pub(super) fn forget(&mut self, digest: &Digest) {
        self.fail(digest, &Error::Stopped(*digest));
        self.let_go(digest);
    }

    /// The ranges that were asked for are here and nobody reads: what is on disk stays, as long as there is room for it.
    fn retire(&mut self, digest: &Digest) {
        let Some(download) = self.remove_download(digest) else { return };
        let (have, pieces) = progress(&download);
        self.setup.notices.put(Notice {
            digest: *digest,
            namespace: download.namespace,
            have,
            pieces,
            state: Active::Gone,
        });
        self.let_go(digest);
    }

    /// Nothing here holds on to a blob any more.
    fn let_go(&mut self, digest: &Digest) {
        for slot in self.blobs.get(digest).map(|shared| shared.lanes.clone()).unwrap_or_default() {
            self.close_lane(slot);
        }
        self.blobs.remove(digest);
    }

    pub(super) fn notice(&mut self, digest: &Digest) {
        let Some(download) = self.downloads.get_mut(digest) else { return };
        let Some(swarm) = &download.swarm else { return };
        download.told = self.now;
        let state = Active::Leeching { want: swarm.want() };
        let (have, pieces) = progress(download);
        let namespace = download.namespace.clone();
        self.setup.notices.put(Notice { digest: *digest, namespace, have, pieces, state });
    }
}
