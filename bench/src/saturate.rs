//! One node driven to its limit, beside the raw limits for the same bytes in the same run.
//!
//! Both ends are processes of their own, pinned apart where there are two cores. Runs alternate between ours and the raw one, so
//! that a machine whose speed drifts drifts for both; the table shows medians and the ratio of medians.

mod child;
mod client;
pub(crate) mod compare;
mod node;
pub(crate) mod programs;
mod raw;
mod table;

use anyhow::Result;
use peer_proto::PeerId;
use std::{
    fs::File,
    io::{BufWriter, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// `shoal-bench saturate`
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Every case of the data path beside its raw limit.
    Table(table::Args),
}

/// `shoal-bench role`: one end of a measurement; started by `saturate`, not by hand.
#[derive(clap::Args)]
pub(crate) struct RoleArgs {
    /// Cores to run on.
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    #[command(subcommand)]
    role: RoleName,
}

#[derive(clap::Subcommand)]
enum RoleName {
    SendfileServer {
        file: PathBuf,
    },
    DiscardClient {
        server: SocketAddr,
        connections: usize,
        len: u64,
    },
    ReceiveFile {
        server: SocketAddr,
        len: u64,
        file: PathBuf,
    },
    Hash {
        len: u64,
    },
    DirectRead {
        file: PathBuf,
    },
    PeerClient(client::Load),
    Seed(node::Seeding),
    Leech {
        #[command(flatten)]
        node: node::Node,
        layout: PathBuf,
        peer: SocketAddr,
        id: PeerId,
    },
}

/// Runs one end.
pub(crate) fn role(args: &RoleArgs) -> Result<()> {
    let mut set = nix::sched::CpuSet::new();
    args.cores.iter().try_for_each(|core| set.set(*core))?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
    child::raise_descriptors()?;
    match &args.role {
        RoleName::SendfileServer { file } => raw::sendfile_server(file),
        RoleName::DiscardClient { server, connections, len } => raw::discard_client(*server, *connections, *len),
        RoleName::ReceiveFile { server, len, file } => raw::receive_file(*server, *len, file),
        RoleName::Hash { len } => raw::hash(*len),
        RoleName::DirectRead { file } => raw::direct_read(file),
        RoleName::PeerClient(load) => client::peer_client(load),
        RoleName::Seed(seeding) => node::seed(seeding),
        RoleName::Leech { node, layout, peer, id } => node::leech(node, layout, *peer, *id),
    }
}

/// Runs the cases and prints their table.
pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Table(args) => table::run(args),
    }
}

/// A file of `len` bytes that do not compress, another for each seed, written so that its pages are in memory.
pub(crate) fn make_blob(path: &Path, len: u64, seed: u64) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ seed;
    let mut chunk = vec![0; 1 << 16];
    for _ in 0..len.div_ceil(1 << 16) {
        for word in chunk.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        out.write_all(&chunk)?;
    }
    let out = out.into_inner()?;
    out.set_len(len)?;
    out.sync_all()?;
    Ok(())
}
