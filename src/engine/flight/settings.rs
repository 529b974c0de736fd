//! How are settings written and read: a run's own, and what tenants are given?
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use super::Beginning;
use super::bytes::{Cursor, put, put_slice};
use crate::engine::core::CoreSettings;
use crate::kv::KvSettings;
use crate::kv::evictor::Policy;
use crate::types::{BlockBytes, BlockCount, BlockSize, Grant, PoolPart, TenantId, TierBudget, TokenCount, Weight};

/// Books are kept for all tenants up to the largest.
pub(super) const MOST_TENANTS: u32 = 65_536;

impl Beginning {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let Self { version, tick_zero_us, core, kv } = self;
        put_slice(out, version.as_bytes());
        put(out, *tick_zero_us);
        put(out, core.max_running as u64);
        put(out, core.step_tokens as u64);
        put(out, u64::from(kv.block_size.0));
        put(out, kv.block_bytes.device);
        put(out, kv.block_bytes.cold);
        put(out, u64::from(kv.device_blocks.0));
        put(out, u64::from(kv.host_blocks.0));
        put(out, u64::from(kv.disk_blocks.0));
        put(out, u64::from(kv.window.0));
        put(out, u64::from(kv.background_offload));
        put(out, u64::from(kv.policy == Policy::ReturnRate));
        for length in [kv.doubles_at, kv.front_first_from] {
            put(out, length.map_or(0, |tokens| u64::from(tokens.0) + 1));
        }
        put(out, kv.journal_entries as u64);
        put(out, u64::from(kv.reuse));
    }

    pub(super) fn read(cursor: &mut Cursor<'_>) -> Option<Self> {
        let version = String::from_utf8(cursor.slice()?.to_vec()).ok()?;
        let tick_zero_us = cursor.number()?;
        let core = CoreSettings { max_running: whole(cursor)?, step_tokens: whole(cursor)? };
        let kv = KvSettings {
            block_size: BlockSize(cursor.small().filter(|size| (1..=65_536).contains(size))?),
            block_bytes: BlockBytes { device: cursor.number()?, cold: cursor.number()? },
            device_blocks: BlockCount(cursor.small()?),
            host_blocks: BlockCount(cursor.small()?),
            disk_blocks: BlockCount(cursor.small()?),
            window: TokenCount(cursor.small()?),
            background_offload: flag(cursor)?,
            policy: if flag(cursor)? { Policy::ReturnRate } else { Policy::Lru },
            doubles_at: length(cursor)?,
            front_first_from: length(cursor)?,
            journal_entries: whole(cursor)?,
            reuse: flag(cursor)?,
        };
        // What no engine would have begun with.
        let possible = kv.window.blocks(kv.block_size) <= kv.device_blocks && core.step_tokens > 0;
        possible.then_some(Self { version, tick_zero_us, core, kv })
    }
}

fn whole(cursor: &mut Cursor<'_>) -> Option<usize> {
    usize::try_from(cursor.number()?).ok()
}

fn length(cursor: &mut Cursor<'_>) -> Option<Option<TokenCount>> {
    match cursor.number()? {
        0 => Some(None),
        tokens => Some(Some(TokenCount(u32::try_from(tokens - 1).ok()?))),
    }
}

fn flag(cursor: &mut Cursor<'_>) -> Option<bool> {
    match cursor.number()? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// Any but a far too large number.
pub fn tenant(cursor: &mut Cursor<'_>) -> Option<TenantId> {
    cursor.small().filter(|tenant| *tenant < MOST_TENANTS).map(TenantId)
}

pub fn put_grants(out: &mut Vec<u8>, grants: &[Grant]) {
    put(out, grants.len() as u64);
    for Grant { tenant, weight, device, host, disk } in grants {
        put(out, u64::from(tenant.0));
        put(out, u64::from(weight.0));
        for TierBudget { floor, ceiling, pins } in [device, host, disk] {
            for part in [floor, ceiling, pins] {
                match part {
                    None => put(out, 0),
                    Some(PoolPart::Bytes(bytes)) => {
                        put(out, 1);
                        put(out, *bytes);
                    }
                    Some(PoolPart::Permille(permille)) => {
                        put(out, 2);
                        put(out, u64::from(*permille));
                    }
                }
            }
        }
    }
}

pub fn grants(cursor: &mut Cursor<'_>) -> Option<Vec<Grant>> {
    (0..cursor.count()?).map(|_| grant(cursor)).collect()
}

fn grant(cursor: &mut Cursor<'_>) -> Option<Grant> {
    let (tenant, weight) = (tenant(cursor)?, Weight(cursor.small()?));
    let (device, host, disk) = (budget(cursor)?, budget(cursor)?, budget(cursor)?);
    Some(Grant { tenant, weight, device, host, disk })
}

fn budget(cursor: &mut Cursor<'_>) -> Option<TierBudget> {
    let (floor, ceiling, pins) = (part(cursor)?, part(cursor)?, part(cursor)?);
    Some(TierBudget { floor, ceiling, pins })
}

fn part(cursor: &mut Cursor<'_>) -> Option<Option<PoolPart>> {
    match cursor.number()? {
        0 => Some(None),
        1 => Some(Some(PoolPart::Bytes(cursor.number()?))),
        2 => Some(Some(PoolPart::Permille(cursor.small()?))),
        _ => None,
    }
}
