//! How fast do blocks come back from each tier, beside what the machine can do at all?
//!
//! The KV of a conversation of 2,000 tokens of SmolLM2-135M. Reload beside plain copies of the same blocks; load from disk
//! beside reading the same file from front to end, past the page cache both. In the system's temporary folder, or where
//! TMPDIR says. And what the block manager takes for one operation among a million blocks.

use std::fs::OpenOptions;
use std::hint::black_box;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rekindle::engine::TurnShape;
use rekindle::kernels::files::{Label, Slots};
use rekindle::kernels::memory::Arena;
use rekindle::kv::block::PrefixHash;
use rekindle::kv::evictor::Policy;
use rekindle::kv::manager::{Admission, Admit};
use rekindle::kv::transfer::{Direction, Ticket, TransferOrder, execute, execute_on_disk};
use rekindle::kv::{KvSettings, Manager};
use rekindle::types::{BlockCount, BlockSize, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount, TokenId};
use rustix::fs::OFlags;

const BLOCKS: u32 = 125;
const BLOCK_BYTES: usize = 16 * 23_040;
/// As large as one read may be.
const SEQUENTIAL: usize = 1 << 20;

fn arena(blocks: u32) -> Arena {
    let arena = Arena::new(blocks as usize, BLOCK_BYTES).expect("memory for the bench");
    (0..blocks).for_each(|block| arena.with_bytes_mut(block, |bytes| bytes.fill(block as u8 + 1)));
    arena
}

fn order(direction: Direction, labels: Vec<(Label, Option<u32>)>) -> TransferOrder {
    // Back to other places than they came from, as it is.
    let pairs = (0..BLOCKS).map(|block| (block, BLOCKS - 1 - block)).collect();
    TransferOrder { ticket: Ticket(0), direction, pairs, labels }
}

fn label(index: u32) -> Label {
    Label {
        tenant: [1; 16],
        conversation: 1,
        index,
        parent: [index as u8; 32],
        hash: [index as u8 + 1; 32],
        used: 1,
        ended: false,
    }
}

fn tiers(c: &mut Criterion) {
    let (device, host) = (arena(BLOCKS), arena(BLOCKS));
    let mut group = c.benchmark_group("a conversation of 2,000 tokens");
    group.throughput(Throughput::Bytes(u64::from(BLOCKS) * BLOCK_BYTES as u64));
    group.sample_size(20);
    group.bench_function("copied, nothing else", |b| {
        b.iter(|| {
            for block in 0..BLOCKS {
                device.with_bytes_mut(BLOCKS - 1 - block, |to| to.copy_from_slice(host.bytes(block)));
            }
        });
    });
    let reload = order(Direction::Reload, Vec::new());
    group.bench_function("reloaded from the host", |b| b.iter(|| black_box(execute(&reload, &device, &host))));

    let folder = tempfile::tempdir().expect("a temporary folder");
    let bytes = u64::from(BLOCKS) * (BLOCK_BYTES as u64 + 4096);
    let (slots, _) = Slots::open(folder.path(), bytes, BLOCK_BYTES, [7; 32]).expect("room for the bench");
    let buffers = [slots.buffer().expect("memory"), slots.buffer().expect("memory")];
    let labels: Vec<_> = (0..BLOCKS).map(|index| (label(index), None)).collect();
    let store = TransferOrder {
        pairs: (0..BLOCKS).map(|block| (block, block)).collect(),
        ..order(Direction::Store { from: Tier::Host }, labels.clone())
    };
    let stored = execute_on_disk(&store, &slots, &device, &host, &buffers);
    assert!(stored.iter().all(Option::is_some), "the disk takes the blocks");
    let path = folder.path().join("slots.0000");
    let direct = if slots.is_direct() { OFlags::DIRECT.bits() as i32 } else { 0 };
    let file = OpenOptions::new().read(true).custom_flags(direct).open(path).expect("the slots");
    let room = Arena::new(1, SEQUENTIAL).expect("memory");
    group.bench_function("read from front to end", |b| {
        b.iter(|| {
            room.with_bytes_mut(0, |room| {
                let mut at = 0;
                while at < bytes {
                    at += file.read_at(room, at).expect("the disk gives them") as u64;
                }
            });
        });
    });
    let load = order(Direction::Load, labels);
    group.bench_function("loaded from disk", |b| {
        b.iter(|| {
            let loaded = execute_on_disk(&load, &slots, &device, &host, &buffers);
            assert!(loaded.iter().all(Option::is_some), "{loaded:?}");
        });
    });
    group.finish();
}

const SIZE: BlockSize = BlockSize(16);
const POOL: u32 = 1_000_000;
/// Blocks of a conversation.
const LENGTH: u32 = 10;

/// A full pool of idle conversations, and the next one's tokens.
fn full_pool() -> (Manager, u128) {
    let mut manager = Manager::new(KvSettings {
        block_size: SIZE,
        block_bytes: BLOCK_BYTES as u64,
        device_blocks: BlockCount(POOL),
        host_blocks: BlockCount(0),
        disk_blocks: BlockCount(0),
        window: TokenCount(LENGTH * SIZE.0),
        background_offload: false,
        policy: Policy::ReturnRate,
        doubles_at: None,
        front_first_from: None,
        journal_entries: 1_000,
        reuse: true,
    });
    let conversations = u128::from(POOL / LENGTH);
    (0..conversations).for_each(|key| turn(&mut manager, key));
    (manager, conversations)
}

/// A whole turn of a new conversation: admitted, encoded, at rest. Takes the places of another if there is no room.
fn turn(manager: &mut Manager, key: u128) {
    let tokens: Vec<_> = (0..LENGTH * SIZE.0).map(|at| TokenId(at + (key as u32) * 7919)).collect();
    let (tenant, tenant_key) = (TenantId(0), TenantKey([1; 32]));
    let hashes = PrefixHash::chain(&tenant_key, &tokens, SIZE);
    let (key, now) = (KvKey(key), Tick(key as u64));
    let admit = Admit { key, tenant, tenant_key, tokens: &tokens, hashes: &hashes, prefill_per_s: 0 };
    let admitted = manager.admit(now, admit);
    assert!(matches!(admitted, Admission::Ready(_)), "{admitted:?}");
    manager.append(key, &tokens);
    manager.rest(now, key, TurnShape { number: 1, new_tokens: TokenCount(LENGTH * SIZE.0) });
}

fn blocks(c: &mut Criterion) {
    let (mut manager, mut next) = full_pool();
    let mut group = c.benchmark_group("among a million blocks of 100,000 idle conversations");
    group.throughput(Throughput::Elements(u64::from(LENGTH)));
    group.bench_function("a turn of 10 blocks that evicts another's", |b| {
        b.iter(|| {
            next += 1;
            turn(&mut manager, next);
            drop((manager.take_orders(), manager.take_chores(), manager.take_touched()));
        });
    });
    group.bench_function("the hashes of 10 blocks, which are part of that", |b| {
        let tokens: Vec<_> = (0..LENGTH * SIZE.0).map(TokenId).collect();
        b.iter(|| PrefixHash::chain(&TenantKey([1; 32]), black_box(&tokens), SIZE));
    });
    group.finish();
}

criterion_group!(benches, tiers, blocks);
criterion_main!(benches);
