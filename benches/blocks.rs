//! What does each operation on one block take, among a million?
//!
//! Conversations of 1,600 tokens, one after another in random order: each gives up half of its blocks, as a victim does, and
//! as many new ones come into their places, as another's turn makes them. What that needs of a million blocks is in no cache
//! of the processor's when its turn comes. Places and hashes are scattered, as after a long life; the blocks of one turn lie
//! together in memory, and turns anywhere. Each stage's time is summed up by itself. Beside them: what one read costs here
//! that waits for memory.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use rekindle::kv::block::{Places, PrefixHash, SealedBlock, Slot};
use rekindle::kv::prefix::PrefixIndex;
use rekindle::kv::table::BlockTable;
use rekindle::types::{BlockCount, BlockId, TenantId, Tick};

/// As in the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const POOL: u32 = 1_000_000;
/// Blocks of a table.
const LENGTH: usize = 100;
/// Of those, how many a turn has added.
const OF_A_TURN: usize = 10;
/// Of a table's blocks, how many come and go.
const COME_AND_GO: usize = LENGTH / 2;
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
        let mut blocks: Vec<Block> = std::iter::from_fn(|| first.take_place())
            .map(|slot| index.insert(SealedBlock::found(slot, PrefixHash::ROOT, numbers.hash(), ())))
            .collect();
        // What a turn has made lies together, and turns anywhere.
        let mut turns: Vec<Vec<Block>> =
            (0..POOL as usize / OF_A_TURN).map(|_| blocks.split_off(blocks.len() - OF_A_TURN)).collect();
        numbers.shuffle(&mut turns);
        let tables = turns.chunks(LENGTH / OF_A_TURN).map(|turns| {
            let mut table = BlockTable::new(&places, TENANT);
            turns.iter().flatten().for_each(|block| table.add(Arc::clone(block)));
            table
        });
        let mut tables: Vec<_> = tables.collect();
        numbers.shuffle(&mut tables);
        Self { places, index, tables, numbers }
    }

    /// The time of each stage of a block's life, for half the blocks of each table.
    fn round(&mut self) -> Stages {
        let Self { places, index, tables, numbers } = self;
        let mut stages = Stages::default();
        for table in tables {
            let hashes: [PrefixHash; COME_AND_GO] = std::array::from_fn(|_| numbers.hash());
            let holder = table.holder();
            let place = |_: &PrefixHash| places.take(TENANT, holder).expect("as many were given up");
            timed(&mut stages.evict, || {
                (0..COME_AND_GO).for_each(|_| _ = black_box(table.take_end()));
            });
            let taken = timed(&mut stages.take, || hashes.each_ref().map(place));
            timed(&mut stages.give_back, || drop(taken));
            let taken = hashes.each_ref().map(place);
            let blocks = timed(&mut stages.seal, || {
                let sealed = taken.into_iter().zip(&hashes).map(|(slot, hash)| {
                    let sealed = SealedBlock::found(slot, PrefixHash::ROOT, *hash, ());
                    index.prefetch(&sealed);
                    sealed
                });
                let sealed: Vec<_> = sealed.collect();
                sealed.into_iter().map(|sealed| index.insert(sealed)).collect::<Vec<Block>>()
            });
            timed(&mut stages.join, || blocks.into_iter().for_each(|block| table.add(block)));
        }
        stages
    }
}

#[derive(Default)]
struct Stages {
    evict: Duration,
    take: Duration,
    give_back: Duration,
    seal: Duration,
    join: Duration,
}

/// Adds what the work takes.
fn timed<T>(sum: &mut Duration, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = black_box(work());
    *sum += started.elapsed();
    done
}

fn blocks(c: &mut Criterion) {
    let mut full = Full::new();
    let come_and_go = (full.tables.len() * COME_AND_GO) as u64;
    let mut group = c.benchmark_group("one of a million blocks");
    group.sample_size(10);
    type OfStage = fn(&Stages) -> Duration;
    let stages: [(&str, OfStage); 5] = [
        ("is taken from the end of an idle conversation, and its place is free", |stages| stages.evict),
        ("is given a place", |stages| stages.take),
        ("gives its place back", |stages| stages.give_back),
        ("is full, its hash known, and can be found", |stages| stages.seal),
        ("joins a conversation's table", |stages| stages.join),
    ];
    for (name, stage) in stages {
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let rounds = times.div_ceil(come_and_go);
                let took: Duration = (0..rounds).map(|_| stage(&full.round())).sum();
                took.mul_f64(times as f64 / (rounds * come_and_go) as f64)
            });
        });
    }
    // A conversation's chain, in its order, as a turn looks it up.
    let hashes: Vec<PrefixHash> = full.tables.iter().flat_map(|table| table.full().map(|block| block.hash())).collect();
    let index = &full.index;
    let mut next = 0;
    group.bench_function("is found by its hash", |b| {
        b.iter(|| {
            next = (next + 1) % hashes.len();
            index.get(black_box(&hashes[next]))
        });
    });
    let mut numbers = Numbers(2);
    let unknown: Vec<PrefixHash> = (0..hashes.len()).map(|_| numbers.hash()).collect();
    group.bench_function("is not found", |b| {
        b.iter(|| {
            next = (next + 1) % unknown.len();
            index.get(black_box(&unknown[next]))
        });
    });
    // Other conversations join half of what each has, as a fork does, and leave it again.
    let shared: Vec<Vec<Block>> =
        full.tables.iter().map(|table| table.full().take(COME_AND_GO).cloned().collect()).collect();
    let mut forks: Vec<_> = shared.iter().map(|_| BlockTable::new(&full.places, TENANT)).collect();
    let times: [(&str, bool); 2] =
        [("is shared with another conversation", true), ("is left by one of two conversations", false)];
    for (name, joining) in times {
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let rounds = times.div_ceil(come_and_go);
                let (mut joined, mut left) = (Duration::ZERO, Duration::ZERO);
                for _ in 0..rounds {
                    timed(&mut joined, || {
                        let pairs = forks.iter_mut().zip(&shared);
                        pairs.for_each(|(fork, blocks)| blocks.iter().for_each(|block| fork.add(Arc::clone(block))));
                    });
                    timed(&mut left, || forks.iter_mut().for_each(BlockTable::clear));
                }
                let took = if joining { joined } else { left };
                took.mul_f64(times as f64 / (rounds * come_and_go) as f64)
            });
        });
    }
    group.bench_function("beside them: a read that waits for memory, and the next for it", |b| {
        let mut order: Vec<usize> = (0..POOL as usize).collect();
        numbers.shuffle(&mut order);
        // Each read says where the next one is, and has a line of the cache, and more, for itself.
        let mut cells = vec![[0usize; 16]; order.len()];
        for at in 0..order.len() {
            cells[order[at]][0] = order[(at + 1) % order.len()];
        }
        let mut at = 0;
        b.iter(|| {
            at = cells[at][0];
            at
        });
    });
    group.finish();
}

criterion_group!(benches, blocks);
criterion_main!(benches);
