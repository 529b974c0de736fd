//! What does a part of the record say, in terms that the core takes?
//!
//! The other half of `writing`. A token is its pseudonym, prefixes are hashed anew under a key that says only which tenant
//! it is, and what stopped an answer is `STOP`: so the core finds the same blocks, and ends turns where they ended.
//! Invariant: any bytes are read or refused; nothing here panics.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::HashMap;
use std::time::Duration;

use super::bytes::Cursor;
use super::pseudonyms::{STOP, last_token};
use super::settings::MOST_TENANTS;
use super::{Outcome, Said, Step, command, settings, sum, tag};
use crate::engine::core::{Command, StartTurn};
use crate::engine::{Sampling, TurnRequest, TurnShape};
use crate::kernels::files::{Contents, FoundSlot, Label};
use crate::kv::block::PrefixHash;
use crate::kv::disk::tenant_mark;
use crate::kv::return_rate::Learned;
use crate::kv::transfer::{Ticket, TransferDone};
use crate::types::{BlockSize, KvKey, TenantId, TenantKey, Tick, Tier, TokenCount, TokenId, TurnId};

/// A tenant's hash key in a replay.
pub fn tenant_key(tenant: TenantId) -> TenantKey {
    let mut key = [0; 32];
    for (byte, of) in key.iter_mut().zip(tenant.0.to_le_bytes()) {
        *byte = of;
    }
    TenantKey(key)
}

/// One thing that the record says.
pub enum Entry {
    /// So many steps are missing here.
    Lost(u64),
    Disk(HeldDisk),
    /// The disk held too much to be written down.
    DiskLeftOut,
    Step(Box<Step>),
}

/// A block that the disk held when a run began.
#[derive(Clone, Debug)]
struct Held {
    slot: u32,
    tenant: Option<TenantId>,
    key: KvKey,
    lives: bool,
    ended: bool,
    index: u32,
    parent: u64,
    name: u64,
    used: u64,
    sum: u32,
}

/// What the disk held when a run began, by names.
#[derive(Clone, Debug, Default)]
pub struct HeldDisk {
    blocks: Vec<Held>,
    unfinished: Vec<u32>,
}

/// Prefix hashes of blocks that the disk held, by name, as far as prompts told: of a replay, whose tokens are pseudonyms.
pub type HeldHashes = HashMap<u64, PrefixHash>;

impl HeldDisk {
    /// What the tier held in the terms of a replay, and which conversations there were.
    pub fn contents(&self, hashes: &HeldHashes) -> (Contents, std::collections::HashSet<KvKey>) {
        // What no prompt has told of is never looked for: any hash will do that is the same for its children.
        let unknown = |name: u64| PrefixHash(*blake3::hash(&name.to_le_bytes()).as_bytes());
        let hash = |name: u64| match name {
            0 => PrefixHash::ROOT.0,
            name => hashes.get(&name).copied().unwrap_or_else(|| unknown(name)).0,
        };
        let blocks = self.blocks.iter().map(|held| FoundSlot {
            slot: held.slot,
            label: Label {
                tenant: held.tenant.map_or([0; 16], |tenant| tenant_mark(&tenant_key(tenant))),
                conversation: held.key.0,
                index: held.index,
                parent: hash(held.parent),
                hash: hash(held.name),
                used: held.used,
                ended: held.ended,
            },
            bytes_sum: held.sum,
        });
        let lives = self.blocks.iter().filter(|held| held.lives).map(|held| held.key);
        (Contents { blocks: blocks.collect(), unfinished: self.unfinished.clone() }, lives.collect())
    }

    /// Whose conversations it held.
    pub fn owners(&self) -> impl Iterator<Item = (KvKey, TenantId)> {
        self.blocks.iter().filter_map(|held| Some((held.key, held.tenant?)))
    }

    /// Those whose blocks it held.
    pub fn tenants(&self) -> Vec<(TenantId, TenantKey)> {
        let mut tenants: Vec<_> = self.blocks.iter().filter_map(|held| held.tenant).collect();
        tenants.sort_unstable();
        tenants.dedup();
        tenants.into_iter().map(|tenant| (tenant, tenant_key(tenant))).collect()
    }
}

/// A full block that the part has told of.
struct Block {
    parent: Option<u32>,
    hash: PrefixHash,
}

/// Where the answer of a turn is.
struct Saying {
    tenant: TenantId,
    parent: Option<u32>,
    open: Vec<TokenId>,
}

/// Reads a run's parts, one after another.
pub struct Reader {
    size: usize,
    /// Of the part, by number; and their tokens, one after another.
    blocks: Vec<Block>,
    tokens: Vec<TokenId>,
    keys: Vec<KvKey>,
    turns: HashMap<TurnId, Saying>,
    at: Tick,
    last_turn: u64,
    /// By the last tokens of its parent and of itself, the names of both, of each block that the disk held.
    held: HashMap<(u32, u32), (u64, u64)>,
    held_hashes: HeldHashes,
}

impl Reader {
    pub fn new(size: BlockSize) -> Self {
        Self {
            size: size.0 as usize,
            blocks: Vec::new(),
            tokens: Vec::new(),
            keys: Vec::new(),
            turns: HashMap::new(),
            at: Tick(0),
            last_turn: 0,
            held: HashMap::new(),
            held_hashes: HashMap::new(),
        }
    }

    pub fn begin_part(&mut self) {
        self.blocks.clear();
        self.tokens.clear();
        self.keys.clear();
        self.turns.clear();
        self.at = Tick(0);
        self.last_turn = 0;
    }

    /// Prefix hashes of blocks that the disk held, as far as was told by now.
    pub fn into_held_hashes(self) -> HeldHashes {
        self.held_hashes
    }

    /// The next entry; `None` if the bytes mean none.
    pub fn entry(&mut self, cursor: &mut Cursor<'_>) -> Option<Entry> {
        match cursor.byte()? {
            tag::LOST => Some(Entry::Lost(cursor.number()?)),
            tag::DISK => Some(Entry::Disk(self.disk(cursor)?)),
            tag::DISK_LEFT_OUT => Some(Entry::DiskLeftOut),
            flags if flags & !(tag::HAS_COMMANDS | tag::COMMITTED | tag::FAILED) == tag::STEP => {
                Some(Entry::Step(Box::new(self.step(flags, cursor)?)))
            }
            _ => None,
        }
    }

    fn step(&mut self, flags: u8, cursor: &mut Cursor<'_>) -> Option<Step> {
        let mut step = Step { planned: self.tick(cursor)?, ..Step::default() };
        if flags & tag::HAS_COMMANDS != 0 {
            step.commands = (0..cursor.count()?).map(|_| self.command(cursor)).collect::<Option<_>>()?;
        }
        if flags & tag::COMMITTED != 0 {
            let at = self.tick(cursor)?;
            let outcome = if flags & tag::FAILED != 0 {
                Outcome::Failed
            } else {
                Outcome::Said((0..cursor.count()?).map(|_| self.said(cursor)).collect::<Option<_>>()?)
            };
            step.committed = Some((at, outcome));
        }
        Some(step)
    }

    fn disk(&mut self, cursor: &mut Cursor<'_>) -> Option<HeldDisk> {
        let mut held = HeldDisk::default();
        for _ in 0..cursor.count()? {
            let slot = cursor.small()?;
            let tenant = match cursor.small()? {
                0 => None,
                tenant => Some(TenantId(tenant - 1)).filter(|tenant| tenant.0 < MOST_TENANTS),
            };
            let (key, flags, index) = (self.key(cursor)?, cursor.byte()?, cursor.small()?);
            let (parent, name) = (u64::from_le_bytes(cursor.array()?), u64::from_le_bytes(cursor.array()?));
            let (used, sum) = (cursor.number()?, self.sum(cursor)??);
            let (lives, ended) = (flags & 1 != 0, flags & 2 != 0);
            self.held.insert((last_token(parent), last_token(name)), (parent, name));
            held.blocks.push(Held { slot, tenant, key, lives, ended, index, parent, name, used, sum });
        }
        held.unfinished = (0..cursor.count()?).map(|_| cursor.small()).collect::<Option<_>>()?;
        Some(held)
    }

    fn tick(&mut self, cursor: &mut Cursor<'_>) -> Option<Tick> {
        self.at = Tick(self.at.0.wrapping_add(cursor.number()?));
        Some(self.at)
    }

    fn turn(&mut self, cursor: &mut Cursor<'_>) -> Option<TurnId> {
        self.last_turn = self.last_turn.wrapping_add(cursor.signed()?.cast_unsigned());
        Some(TurnId(self.last_turn))
    }

    fn key(&mut self, cursor: &mut Cursor<'_>) -> Option<KvKey> {
        match usize::try_from(cursor.number()?).ok()? {
            0 => {
                let key = KvKey(u128::from_le_bytes(cursor.array()?));
                self.keys.push(key);
                Some(key)
            }
            number => self.keys.get(number - 1).copied(),
        }
    }

    fn command(&mut self, cursor: &mut Cursor<'_>) -> Option<Command> {
        Some(match cursor.byte()? {
            command::START => Command::Start(Box::new(self.start(cursor)?)),
            command::CANCEL => Command::Cancel(self.turn(cursor)?),
            command::FORGET => Command::Forget(self.key(cursor)?),
            command::LEAVE_TO_HOST => Command::Leave(self.key(cursor)?, Tier::Host),
            command::LEAVE_TO_DISK => Command::Leave(self.key(cursor)?, Tier::Disk),
            command::LET_GO => Command::LetGo(self.key(cursor)?),
            command::END => Command::End(self.key(cursor)?),
            command::REOPEN => Command::Reopen(self.key(cursor)?),
            command::AWAIT_TOOL => Command::AwaitTool(self.key(cursor)?),
            which @ (command::PIN | command::UNPIN) => {
                let (key, tenant) = (self.key(cursor)?, settings::tenant(cursor)?);
                let for_us = if which == command::PIN { Some(cursor.number()?) } else { None };
                Command::Pin { key, tenant, tenant_key: tenant_key(tenant), for_us }
            }
            command::TRANSFERRED => {
                let (ticket, took_us) = (Ticket(cursor.number()?), cursor.number()?);
                let sums = (0..cursor.count()?).map(|_| self.sum(cursor)).collect::<Option<_>>()?;
                Command::Transferred(TransferDone { ticket, sums, took_us })
            }
            command::GRANT => Command::Grant(settings::grants(cursor)?),
            command::GO_ON_FROM => Command::GoOnFrom(Learned::from_bytes(cursor.slice()?)?),
            _ => return None,
        })
    }

    fn sum(&self, cursor: &mut Cursor<'_>) -> Option<Option<u32>> {
        match cursor.byte()? {
            sum::NONE => Some(None),
            sum::ZERO => Some(Some(0)),
            sum::SOME => Some(Some(u32::from_le_bytes(cursor.array()?))),
            _ => None,
        }
    }

    fn start(&mut self, cursor: &mut Cursor<'_>) -> Option<StartTurn> {
        let (turn, key, tenant) = (self.turn(cursor)?, self.key(cursor)?, settings::tenant(cursor)?);
        let encoded_before = TokenCount(cursor.small()?);
        let shape = TurnShape { number: cursor.small()?, new_tokens: TokenCount(cursor.small()?) };
        let (max_tokens, deadline_us) = (TokenCount(cursor.small()?), cursor.number()?);
        let mut parent = match cursor.small()? {
            0 => None,
            number => Some(number - 1),
        };
        let (mut tokens, mut hashes) = self.history(parent)?;
        let mut open = Vec::new();
        for _ in 0..cursor.number()? {
            let token = TokenId(u32::from_le_bytes(cursor.array()?));
            tokens.push(token);
            open.push(token);
            if open.len() == self.size {
                parent = Some(self.number(tenant, parent, &open)?);
                hashes.extend(self.blocks.last().map(|block| block.hash));
                open.clear();
            }
        }
        if tokens.is_empty() {
            return None;
        }
        self.turns.insert(turn, Saying { tenant, parent, open });
        let request = TurnRequest {
            prompt: tokens.into(),
            encoded_before,
            shape,
            sampling: Sampling::default(),
            max_tokens,
            stop_tokens: [STOP].into(),
            queue_deadline: Duration::from_micros(deadline_us),
            logprobs: None,
        };
        Some(StartTurn { turn, key, tenant, tenant_key: tenant_key(tenant), hashes, request })
    }

    /// The tokens up to the end of a block, and the chain over them.
    fn history(&self, last: Option<u32>) -> Option<(Vec<TokenId>, Vec<PrefixHash>)> {
        let mut chain = Vec::new();
        let mut next = last;
        while let Some(number) = next {
            let index = usize::try_from(number).ok()?;
            let block = self.blocks.get(index)?;
            chain.push((index, block.hash));
            next = block.parent;
        }
        let mut tokens = Vec::with_capacity((chain.len() + 1) * self.size);
        for (index, _) in chain.iter().rev() {
            tokens.extend_from_slice(self.tokens.get(index * self.size..)?.get(..self.size)?);
        }
        Some((tokens, chain.iter().rev().map(|(_, hash)| *hash).collect()))
    }

    /// Gives a full block the next number.
    fn number(&mut self, tenant: TenantId, parent: Option<u32>, tokens: &[TokenId]) -> Option<u32> {
        let (before, last_before) = match parent {
            None => (PrefixHash::ROOT, last_token(0)),
            Some(number) => {
                let index = usize::try_from(number).ok()?;
                let last = self.tokens.get(index * self.size + self.size - 1)?;
                (self.blocks.get(index)?.hash, last.0)
            }
        };
        let hash = before.child(&tenant_key(tenant), tokens);
        // What lies before it need not be on disk: its place in the chain is told by the last tokens of both.
        if let Some((parent, name)) = self.held.get(&(last_before, tokens.last()?.0)).copied() {
            self.held_hashes.entry(parent).or_insert(before);
            self.held_hashes.entry(name).or_insert(hash);
        }
        self.blocks.push(Block { parent, hash });
        self.tokens.extend_from_slice(tokens);
        u32::try_from(self.blocks.len() - 1).ok()
    }

    fn said(&mut self, cursor: &mut Cursor<'_>) -> Option<Said> {
        let (turn, token) = (self.turn(cursor)?, TokenId(u32::from_le_bytes(cursor.array()?)));
        if token == STOP {
            return Some(Said { turn, token, stops: true });
        }
        if let Some(mut saying) = self.turns.remove(&turn) {
            saying.open.push(token);
            if saying.open.len() == self.size {
                saying.parent = Some(self.number(saying.tenant, saying.parent, &saying.open)?);
                saying.open.clear();
            }
            self.turns.insert(turn, saying);
        }
        Some(Said { turn, token, stops: false })
    }
}
