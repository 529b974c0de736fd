//! How is a step written, without what was said in it?
//!
//! A part of the record can be read alone: blocks and conversations are numbered anew in each. A prompt is written as the
//! number of the last block of it that the part has already, then pseudonyms of the tokens after that; a full block gets the
//! next number. Who reads numbers alike (`reading`). A turn that goes on from an earlier part says tokens, and its blocks get
//! no numbers.

use std::borrow::Cow;
use std::collections::HashMap;

use super::bytes::{put, put_signed, put_slice};
use super::pseudonyms::{Chain, Pseudonyms, STOP, last_token};
use super::settings::put_grants;
use super::{DiskBefore, Outcome, Said, Step, command, sum, tag};
use crate::engine::core::{Command, StartTurn};
use crate::kv::block::PrefixHash;
use crate::kv::disk::tenant_mark;
use crate::kv::transfer::TransferDone;
use crate::types::{BlockSize, KvKey, TenantId, TenantKey, Tick, Tier, TokenId, TurnId};

/// Writes a run's entries.
pub struct Writer {
    pseudonyms: Pseudonyms,
    size: BlockSize,
    /// Of the part: by a block's name, its number.
    blocks: HashMap<u64, u32>,
    next_block: u32,
    /// Of the part: by conversation, its number.
    keys: HashMap<KvKey, u64>,
    turns: HashMap<TurnId, Saying>,
    at: Tick,
    last_turn: u64,
    out: Vec<u8>,
}

/// Where the answer of a turn is.
struct Saying {
    tenant_key: TenantKey,
    /// The last full block.
    parent: PrefixHash,
    /// The tokens after it.
    open: Vec<TokenId>,
    chain: Chain,
    /// It began in this part: its blocks get numbers.
    is_numbered: bool,
}

impl Writer {
    pub fn new(size: BlockSize) -> Self {
        Self {
            pseudonyms: Pseudonyms::random(),
            size,
            blocks: HashMap::new(),
            next_block: 0,
            keys: HashMap::new(),
            turns: HashMap::new(),
            at: Tick(0),
            last_turn: 0,
            out: Vec::new(),
        }
    }

    /// From here on nothing of what was written is needed to read what comes.
    pub fn begin_part(&mut self) {
        self.blocks.clear();
        self.next_block = 0;
        self.keys.clear();
        self.turns.values_mut().for_each(|turn| turn.is_numbered = false);
        self.at = Tick(0);
        self.last_turn = 0;
    }

    pub fn written(&self) -> usize {
        self.out.len()
    }

    /// What was written since this was asked last.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// What the disk tier held when the run began.
    pub fn disk(&mut self, disk: &DiskBefore) {
        let DiskBefore { found, tenants, lives } = disk;
        let marks: HashMap<[u8; 16], TenantId> = tenants.iter().map(|(id, key)| (tenant_mark(key), *id)).collect();
        self.out.push(tag::DISK);
        put(&mut self.out, found.blocks.len() as u64);
        for block in &found.blocks {
            let label = &block.label;
            let key = KvKey(label.conversation);
            put(&mut self.out, u64::from(block.slot));
            put(&mut self.out, marks.get(&label.tenant).map_or(0, |tenant| u64::from(tenant.0) + 1));
            self.key(key);
            self.out.push(u8::from(lives.contains(&key)) | u8::from(label.ended) << 1);
            put(&mut self.out, u64::from(label.index));
            for hash in [label.parent, label.hash] {
                self.out.extend(self.pseudonyms.name(PrefixHash(hash)).to_le_bytes());
            }
            put(&mut self.out, label.used);
            self.sum(Some(block.bytes_sum));
        }
        put(&mut self.out, found.unfinished.len() as u64);
        found.unfinished.iter().for_each(|slot| put(&mut self.out, u64::from(*slot)));
    }

    /// That it held more than the record has room for.
    pub fn disk_left_out(&mut self) {
        self.out.push(tag::DISK_LEFT_OUT);
    }

    /// That steps are missing here.
    pub fn lost(&mut self, steps: u64) {
        self.out.push(tag::LOST);
        put(&mut self.out, steps);
    }

    pub fn step(&mut self, step: &Step) {
        if step.lost_before > 0 {
            self.lost(step.lost_before);
            // Some of them may have ended there, and a replay ends here.
            self.turns.clear();
        }
        let flags = match &step.committed {
            None => 0,
            Some((_, Outcome::Said(_))) => tag::COMMITTED,
            Some((_, Outcome::Failed)) => tag::COMMITTED | tag::FAILED,
        };
        let has_commands = if step.commands.is_empty() { 0 } else { tag::HAS_COMMANDS };
        self.out.push(tag::STEP | flags | has_commands);
        self.tick(step.planned);
        if !step.commands.is_empty() {
            put(&mut self.out, step.commands.len() as u64);
            step.commands.iter().for_each(|command| self.command(command));
        }
        if let Some((at, outcome)) = &step.committed {
            self.tick(*at);
            if let Outcome::Said(said) = outcome {
                put(&mut self.out, said.len() as u64);
                said.iter().for_each(|said| self.said(said));
            }
        }
        for turn in &step.ended {
            self.turns.remove(turn);
        }
    }

    fn tick(&mut self, at: Tick) {
        put(&mut self.out, at.0.wrapping_sub(self.at.0));
        self.at = at;
    }

    fn turn(&mut self, turn: TurnId) {
        put_signed(&mut self.out, turn.0.wrapping_sub(self.last_turn).cast_signed());
        self.last_turn = turn.0;
    }

    fn key(&mut self, key: KvKey) {
        let next = self.keys.len() as u64 + 1;
        let number = *self.keys.entry(key).or_insert(next);
        if number == next {
            put(&mut self.out, 0);
            self.out.extend(key.0.to_le_bytes());
        } else {
            put(&mut self.out, number);
        }
    }

    fn command(&mut self, command: &Command) {
        let of_key = |writer: &mut Self, tag: u8, key: KvKey| {
            writer.out.push(tag);
            writer.key(key);
        };
        match command {
            Command::Start(start) => self.start(start),
            Command::Cancel(turn) => {
                self.out.push(command::CANCEL);
                self.turn(*turn);
            }
            Command::Forget(key) => of_key(self, command::FORGET, *key),
            Command::Leave(key, Tier::Disk) => of_key(self, command::LEAVE_TO_DISK, *key),
            Command::Leave(key, Tier::Host | Tier::Device) => of_key(self, command::LEAVE_TO_HOST, *key),
            Command::LetGo(key) => of_key(self, command::LET_GO, *key),
            Command::End(key) => of_key(self, command::END, *key),
            Command::Reopen(key) => of_key(self, command::REOPEN, *key),
            Command::AwaitTool(key) => of_key(self, command::AWAIT_TOOL, *key),
            Command::Pin { key, tenant, for_us, .. } => {
                of_key(self, if for_us.is_some() { command::PIN } else { command::UNPIN }, *key);
                put(&mut self.out, u64::from(tenant.0));
                for_us.iter().for_each(|us| put(&mut self.out, *us));
            }
            Command::Transferred(TransferDone { ticket, sums, took_us }) => {
                self.out.push(command::TRANSFERRED);
                put(&mut self.out, ticket.0);
                put(&mut self.out, *took_us);
                put(&mut self.out, sums.len() as u64);
                sums.iter().for_each(|sum| self.sum(*sum));
            }
            Command::Grant(grants) => {
                self.out.push(command::GRANT);
                put_grants(&mut self.out, grants);
            }
            Command::GoOnFrom(learned) => {
                self.out.push(command::GO_ON_FROM);
                put_slice(&mut self.out, &learned.to_bytes());
            }
        }
    }

    fn sum(&mut self, moved: Option<u32>) {
        match moved {
            None => self.out.push(sum::NONE),
            Some(0) => self.out.push(sum::ZERO),
            Some(moved) => {
                self.out.push(sum::SOME);
                self.out.extend(self.pseudonyms.sum(moved));
            }
        }
    }

    fn start(&mut self, start: &StartTurn) {
        let size = self.size.0 as usize;
        let request = &start.request;
        let tokens = &request.prompt;
        let full = tokens.len() / size;
        let hashes = match start.hashes.get(..full) {
            Some(hashes) => Cow::Borrowed(hashes),
            None => Cow::Owned(PrefixHash::chain(&start.tenant_key, tokens, self.size)),
        };
        // From the end: of a prompt that goes on from another, few blocks are new.
        let mut names = Vec::new();
        let mut known = None;
        for hash in hashes.iter().rev() {
            let name = self.pseudonyms.name(*hash);
            known = self.blocks.get(&name).copied();
            if known.is_some() {
                break;
            }
            names.push(name);
        }
        names.reverse();
        let depth = full - names.len();

        self.out.push(command::START);
        self.turn(start.turn);
        self.key(start.key);
        let deadline_us = u64::try_from(request.queue_deadline.as_micros()).unwrap_or(u64::MAX);
        for number in [
            u64::from(start.tenant.0),
            u64::from(request.encoded_before.0),
            u64::from(request.shape.number),
            u64::from(request.shape.new_tokens.0),
            u64::from(request.max_tokens.0),
            deadline_us,
            known.map_or(0, |number| u64::from(number) + 1),
            (tokens.len() - depth * size) as u64,
        ] {
            put(&mut self.out, number);
        }
        let mut parent = depth.checked_sub(1).map_or(PrefixHash::ROOT, |last| hashes[last]);
        let blocks = tokens[depth * size..].chunks_exact(size);
        let rest = blocks.remainder();
        for ((block, name), hash) in blocks.zip(names).zip(&hashes[depth..]) {
            let mut chain = self.pseudonyms.chain(parent, &start.tenant_key);
            for token in &block[..size - 1] {
                let pseudonym = self.pseudonyms.next(&mut chain, *token);
                self.token(pseudonym);
            }
            self.token(last_token(name));
            self.number(name);
            parent = *hash;
        }
        let chain = self.pseudonyms.chain(parent, &start.tenant_key);
        let mut saying = Saying { tenant_key: start.tenant_key, parent, open: Vec::new(), chain, is_numbered: true };
        for token in rest {
            let pseudonym = self.pseudonyms.next(&mut saying.chain, *token);
            self.token(pseudonym);
            saying.open.push(*token);
        }
        self.turns.insert(start.turn, saying);
    }

    fn said(&mut self, said: &Said) {
        self.turn(said.turn);
        if said.stops {
            return self.token(STOP.0);
        }
        let Some(turn) = self.turns.get_mut(&said.turn) else {
            // It began in a step that was lost.
            return self.token(0);
        };
        turn.open.push(said.token);
        if turn.open.len() < self.size.0 as usize {
            let pseudonym = self.pseudonyms.next(&mut turn.chain, said.token);
            return self.token(pseudonym);
        }
        turn.parent = turn.parent.child(&turn.tenant_key, &turn.open);
        turn.open.clear();
        turn.chain = self.pseudonyms.chain(turn.parent, &turn.tenant_key);
        let (name, is_numbered) = (self.pseudonyms.name(turn.parent), turn.is_numbered);
        self.token(last_token(name));
        if is_numbered {
            self.number(name);
        }
    }

    fn token(&mut self, pseudonym: u32) {
        self.out.extend(pseudonym.to_le_bytes());
    }

    /// Gives a block that was written to its end the next number.
    fn number(&mut self, name: u64) {
        self.blocks.insert(name, self.next_block);
        self.next_block += 1;
    }
}
