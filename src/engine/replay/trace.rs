//! What happened on a server, turn by turn, as far as a replay needs it?
//!
//! CSV with a header, a request a line, in the order of arrival: `t` (ms), `tenant`, `conv`, `turn` (from 1), `in` and
//! `out` (tokens of the whole prompt and of the answer), `ref` and `shared` (the first `shared` tokens of the prompt are
//! those of the sequence of request number `ref`; -1: of none), `stop` (`t`: the answer called a tool). No text.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::io::{self, BufRead};

use crate::kv::return_rate::Learned;
use crate::types::{Grant, KvKey, TenantId, Tick, Tier, TokenCount, counted};

/// Why a trace can't be replayed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("the trace can't be read")]
    Unreadable(#[from] io::Error),
    #[error("the trace is compressed; write `zcat FILE | rekindle replay - …`")]
    Compressed,
    #[error(
        "the trace's first line has no column `{0}`; it names t, tenant, conv, turn, in, out, ref, shared and stop"
    )]
    NoColumn(&'static str),
    #[error("line {line} of the trace: {reason}")]
    Line { line: usize, reason: String },
    #[error("the trace has no requests")]
    Empty,
}

/// How an answer ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// In a tool call, whose result will come.
    ToolCall,
    Other,
}

/// A turn as it came.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub at: Tick,
    pub tenant: TenantId,
    pub conversation: KvKey,
    /// From 1.
    pub turn: u32,
    /// The whole prompt, history included.
    pub prompt: TokenCount,
    pub answer: TokenCount,
    /// Number of the request with whose sequence the prompt begins, and for how many tokens.
    pub follows: Option<(usize, TokenCount)>,
    pub end: End,
}

impl Request {
    /// Tokens that a memory without end would still have.
    pub fn reusable(&self) -> TokenCount {
        self.follows.map_or(TokenCount(0), |(_, shared)| shared)
    }

    /// Prompt and answer.
    pub fn sequence(&self) -> TokenCount {
        TokenCount(self.prompt.0 + self.answer.0)
    }
}

/// What a server was told beside its turns. Only the flight record knows: CSV has none of it.
#[derive(Clone, Debug)]
pub enum Told {
    Over(KvKey),
    /// It was taken for over, and isn't.
    NotOver(KvKey),
    Forget(KvKey),
    Leave(KvKey, Tier),
    /// `None`: no longer.
    Pin {
        conversation: KvKey,
        tenant: TenantId,
        for_us: Option<u64>,
    },
    Grant(Vec<Grant>),
    GoOnFrom(Learned),
}

/// When it was told, and before which request.
#[derive(Clone, Debug)]
pub struct Notice {
    pub at: Tick,
    pub before: usize,
    pub told: Told,
}

/// A server's turns, in the order of arrival.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    pub requests: Vec<Request>,
    /// In the order in which they were told.
    pub notices: Vec<Notice>,
}

/// Books are kept for all tenants up to the largest.
const MOST_TENANTS: u32 = 65_535;
const COLUMNS: [&str; 9] = ["t", "tenant", "conv", "turn", "in", "out", "ref", "shared", "stop"];

impl Trace {
    /// Seconds from the first request to the last.
    pub fn span_s(&self) -> u64 {
        let span = self.requests.first().zip(self.requests.last());
        span.map_or(0, |(first, last)| last.at.ms_since(first.at) / 1000)
    }

    pub fn read(mut input: impl BufRead) -> Result<Self, TraceError> {
        if input.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
            return Err(TraceError::Compressed);
        }
        let mut lines = input.lines();
        let header = lines.next().transpose()?.ok_or(TraceError::Empty)?;
        let names: Vec<&str> = header.trim_end().split(',').collect();
        let mut places = [0; COLUMNS.len()];
        for (place, column) in places.iter_mut().zip(COLUMNS) {
            *place = names.iter().position(|name| *name == column).ok_or(TraceError::NoColumn(column))?;
        }
        let mut requests: Vec<Request> = Vec::new();
        for (line, text) in (2..).zip(lines) {
            let request = request(&text?, &places, &requests);
            requests.push(request.map_err(|reason| TraceError::Line { line, reason })?);
        }
        if requests.is_empty() { Err(TraceError::Empty) } else { Ok(Self { requests, notices: Vec::new() }) }
    }

    /// Whether it has a turn of this tenant's, or says what it was given.
    pub fn knows(&self, tenant: TenantId) -> bool {
        let is_given =
            |told: &Told| matches!(told, Told::Grant(grants) if grants.iter().any(|grant| grant.tenant == tenant));
        self.requests.iter().any(|request| request.tenant == tenant)
            || self.notices.iter().any(|notice| is_given(&notice.told))
    }

    /// Tokens of all sequences together, each shared one once.
    pub fn distinct_tokens(&self) -> u64 {
        let fresh = |request: &Request| u64::from(request.sequence().0 - request.reusable().0);
        self.requests.iter().map(fresh).sum()
    }

    /// The longest prompt with its answer.
    pub fn longest(&self) -> TokenCount {
        self.requests.iter().map(Request::sequence).max().unwrap_or_default()
    }
}

/// The request of a line, which may follow those `before` it.
fn request(line: &str, places: &[usize; 9], before: &[Request]) -> Result<Request, String> {
    let fields: Vec<&str> = line.trim_end().split(',').collect();
    let mut values = places
        .iter()
        .zip(COLUMNS)
        .map(|(place, column)| fields.get(*place).copied().ok_or_else(|| format!("`{column}` is missing")));
    let mut next = || values.next().unwrap_or_else(|| Err("a column is missing".to_owned()));
    fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
        text.parse().map_err(|_| format!("`{text}` is no number of this column"))
    }
    let at = Tick(number::<u64>(next()?)?.checked_mul(1000).ok_or("the time is too late")?);
    let tenant = TenantId(number(next()?)?);
    if tenant.0 > MOST_TENANTS {
        return Err(format!("tenant {tenant} is too large a number: tenants are numbered from 0 to {MOST_TENANTS}"));
    }
    let (conversation, turn) = (KvKey(number(next()?)?), number(next()?)?);
    let (prompt, answer) = (TokenCount(number(next()?)?), TokenCount(number(next()?)?));
    let (follows, shared): (i64, u32) = (number(next()?)?, number(next()?)?);
    let end = if next()? == "t" { End::ToolCall } else { End::Other };
    if before.last().is_some_and(|last| at < last.at) {
        return Err("it came before the line above".to_owned());
    }
    prompt.0.checked_add(answer.0).filter(|tokens| *tokens > 0).ok_or("it has no tokens, or too many")?;
    let follows = match usize::try_from(follows) {
        Err(_) => None,
        Ok(number) => {
            let followed =
                before.get(number).ok_or_else(|| format!("it follows request {number}, which is not before it"))?;
            if shared > followed.sequence().0 || shared > prompt.0 {
                return Err(format!(
                    "it shares {} with request {number}, more than one of both has",
                    counted(shared, "token", "tokens")
                ));
            }
            Some((number, TokenCount(shared)))
        }
    };
    Ok(Request { at, tenant, conversation, turn, prompt, answer, follows, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "t,tenant,conv,turn,in,out,ref,shared,stop\n";

    fn read(lines: &str) -> Result<Trace, TraceError> {
        Trace::read(format!("{HEAD}{lines}").as_bytes())
    }

    #[test]
    fn a_trace_is_read_by_its_header_and_distinct_tokens_count_once() {
        let trace = read("0,1,7,1,100,20,-1,0,e\n3000,1,7,2,150,10,0,120,t\n").unwrap();
        let second = trace.requests[1];
        assert_eq!((second.at, second.tenant, second.conversation), (Tick(3_000_000), TenantId(1), KvKey(7)));
        assert_eq!((second.follows, second.end), (Some((0, TokenCount(120))), End::ToolCall));
        assert_eq!((trace.distinct_tokens(), trace.longest()), (160, TokenCount(160)));
        let other = "stop,shared,ref,out,in,turn,conv,tenant,t\n-,0,-1,20,100,1,7,1,0\n";
        assert_eq!(Trace::read(other.as_bytes()).unwrap().requests[0].prompt, TokenCount(100));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (lines, says) in [
            ("0,1,7,1,100\n", "line 2"),
            ("0,1,7,1,100,20,-1,0,e\n0,1,x,1,1,1,-1,0,e\n", "line 3 of the trace: `x`"),
            ("5,1,7,1,9,2,-1,0,e\n4,1,7,2,9,2,-1,0,e\n", "before the line above"),
            ("0,1,7,1,9,2,0,4,e\n", "follows request 0"),
            ("0,1,7,1,9,2,-1,0,e\n0,1,7,2,99,2,0,12,e\n", "shares 12"),
            ("0,1,7,1,0,0,-1,0,e\n", "no tokens"),
            ("0,1,7,1,4294967295,2,-1,0,e\n", "too many"),
            ("", "no requests"),
        ] {
            let error = read(lines).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let large = format!("{HEAD}0,3000000000,1,1,10,1,-1,0,-\n");
        assert!(Trace::read(large.as_bytes()).unwrap_err().to_string().contains("line 2"));
        assert!(Trace::read("t,conv\n".as_bytes()).unwrap_err().to_string().contains("`tenant`"));
        assert!(Trace::read([0x1f, 0x8b, 8].as_slice()).unwrap_err().to_string().contains("zcat"));
    }
}
