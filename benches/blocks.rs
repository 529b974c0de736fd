//! What does each operation on one block take, among a million?
//!
//! Each by itself, over the whole pool in random order, so that next to nothing it needs is in the processor's caches. What
//! an operation needs, and what undoes it, is not timed.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use rekindle::kv::block::{Places, PrefixHash, SealedBlock, Slot};
use rekindle::kv::prefix::PrefixIndex;
use rekindle::kv::table::BlockTable;
use rekindle::types::{BlockCount, BlockId, TenantId, Tick};

const POOL: u32 = 1_000_000;
/// Blocks of a table.
const LENGTH: usize = 10;
const TENANT: TenantId = TenantId(0);

type Block = Arc<SealedBlock<BlockId>>;

/// SplitMix64: the same numbers each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn hash(&mut self) -> PrefixHash {
        PrefixHash(bytemuck::cast([self.next(), self.next(), self.next(), self.next()]))
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        (1..items.len()).rev().for_each(|last| items.swap(last, (self.next() % (last as u64 + 1)) as usize));
    }
}

/// A pool whose blocks are all full, known, and in some table.
struct Full {
    places: Arc<Places>,
    index: PrefixIndex<BlockId>,
    tables: Vec<BlockTable<BlockId>>,
    /// In an order that has nothing to do with where they lie.
    hashes: Vec<PrefixHash>,
    numbers: Numbers,
}

impl Full {
    fn new() -> Self {
        let (places, mut index, mut numbers) = (Places::new(BlockCount(POOL)), PrefixIndex::default(), Numbers(1));
        places.tell_time(Tick(1));
        let mut order: Vec<Slot<BlockId>> = Vec::new();
        let first = BlockTable::<BlockId>::new(&places, TENANT);
        order.extend(std::iter::from_fn(|| first.take_place()));
        // The places come back in random order, as after a long life.
        numbers.shuffle(&mut order);
        drop(order);
        let mut hashes = Vec::new();
        let tables = (0..POOL as usize / LENGTH).map(|_| {
            let mut table = BlockTable::new(&places, TENANT);
            for _ in 0..LENGTH {
                let (hash, slot) = (numbers.hash(), table.take_place().expect("the pool has room"));
                table.add(index.insert(SealedBlock::found(slot, PrefixHash::ROOT, hash, ())));
                hashes.push(hash);
            }
            table
        });
        let mut tables: Vec<_> = tables.collect();
        numbers.shuffle(&mut tables);
        numbers.shuffle(&mut hashes);
        Self { places, index, tables, hashes, numbers }
    }

    /// Takes the ends of all tables, so that a tenth of the pool is free; the places come back in random order.
    fn lose_ends(&mut self) {
        self.tables.iter_mut().for_each(|table| drop(table.take_end()));
    }

    /// A place for each table.
    fn take(&self) -> Vec<Slot<BlockId>> {
        let places = self.tables.iter().map(|table| self.places.take(TENANT, table.holder()));
        places.map(|place| place.expect("each lost one")).collect()
    }

    /// Makes full blocks of places.
    fn seal(&mut self, places: Vec<Slot<BlockId>>, hashes: &[PrefixHash]) -> Vec<Block> {
        let sealed = places.into_iter().zip(hashes);
        sealed.map(|(slot, hash)| self.index.insert(SealedBlock::found(slot, PrefixHash::ROOT, *hash, ()))).collect()
    }

    /// Gives each table its last block again.
    fn join(&mut self, blocks: Vec<Block>) {
        self.tables.iter_mut().zip(blocks).for_each(|(table, block)| table.add(block));
    }

    fn new_hashes(&mut self) -> Vec<PrefixHash> {
        (0..self.tables.len()).map(|_| self.numbers.hash()).collect()
    }

    /// The time of each stage of what a table's last block goes through, for every table.
    fn round(&mut self) -> Stages {
        let evict = timed(|| self.lose_ends()).0;
        let (take, places) = timed(|| self.take());
        let give_back = timed(|| drop(places)).0;
        let (places, hashes) = (self.take(), self.new_hashes());
        let (seal, blocks) = timed(|| self.seal(places, &hashes));
        let join = timed(|| self.join(blocks)).0;
        Stages { evict, take, give_back, seal, join }
    }
}

struct Stages {
    evict: Duration,
    take: Duration,
    give_back: Duration,
    seal: Duration,
    join: Duration,
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let started = Instant::now();
    let done = black_box(work());
    (started.elapsed(), done)
}

fn blocks(c: &mut Criterion) {
    let mut full = Full::new();
    let tables = full.tables.len() as u32;
    let mut group = c.benchmark_group("one of a million blocks");
    group.sample_size(10);
    let stages: [(&str, fn(&Stages) -> Duration); 5] = [
        ("is taken from the end of an idle conversation, and its place is free", |stages| stages.evict),
        ("is given a place", |stages| stages.take),
        ("gives its place back", |stages| stages.give_back),
        ("is full, its hash known, and can be found", |stages| stages.seal),
        ("joins a conversation's table", |stages| stages.join),
    ];
    for (name, stage) in stages {
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let rounds = times.div_ceil(u64::from(tables));
                let took: Duration = (0..rounds).map(|_| stage(&full.round())).sum();
                took.mul_f64(times as f64 / (rounds * u64::from(tables)) as f64)
            });
        });
    }
    // What the rounds took away is known no more.
    full.hashes = full.tables.iter().flat_map(|table| table.full().map(|block| block.hash())).collect();
    let Full { numbers, hashes, .. } = &mut full;
    numbers.shuffle(hashes);
    let mut next = 0;
    group.bench_function("is found by its hash", |b| {
        b.iter(|| {
            next = (next + 1) % full.hashes.len();
            full.index.get(black_box(&full.hashes[next]))
        });
    });
    let unknown: Vec<PrefixHash> = (0..full.hashes.len()).map(|_| full.numbers.hash()).collect();
    group.bench_function("is not found", |b| {
        b.iter(|| {
            next = (next + 1) % unknown.len();
            full.index.get(black_box(&unknown[next]))
        });
    });
    // Each is a block more of another conversation's, in random order; then it leaves that again.
    let shared: Vec<Block> = full.hashes.iter().take(tables as usize).filter_map(|hash| full.index.get(hash)).collect();
    let mut others: Vec<_> = (0..shared.len()).map(|_| BlockTable::new(&full.places, TENANT)).collect();
    full.numbers.shuffle(&mut others);
    let times: [(&str, bool); 2] =
        [("is shared with another conversation", true), ("is left by one of two conversations", false)];
    for (name, joining) in times {
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let rounds = times.div_ceil(shared.len() as u64);
                let took = (0..rounds).map(|_| {
                    let join =
                        || others.iter_mut().zip(&shared).for_each(|(table, block)| table.add(Arc::clone(block)));
                    let joined = timed(join).0;
                    let left = timed(|| others.iter_mut().for_each(|table| drop(table.take_end()))).0;
                    if joining { joined } else { left }
                });
                took.sum::<Duration>().mul_f64(times as f64 / (rounds * shared.len() as u64) as f64)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, blocks);
criterion_main!(benches);
