//! What does each GET under `/admin/api` answer?

use actix_web::http::header::CONTENT_TYPE;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::access::Who;
use super::history::{COARSE_S, LINES, Sample};
use super::index::{Cursor, Query, Sort, State};
use super::view::View;
use super::{Api, Dashboard, EVERY, journal};
use crate::api::error::ApiError;
use crate::api::{ids, sse};
use crate::types::{KvKey, TenantId, Tick, Tier};

const MINUTE_US: u64 = 60_000_000;

type Page = web::Data<Dashboard>;

/// An answer, with what events it has in it.
fn answer(
    dashboard: &Dashboard,
    told: impl FnOnce(&View<'_>) -> Result<Value, ApiError>,
) -> Result<HttpResponse, ApiError> {
    let value = dashboard.inner.read(|view| {
        let mut object = Map::new();
        object.insert("as_of".into(), dashboard.inner.as_of(view));
        match told(view)? {
            Value::Object(fields) => object.extend(fields),
            other => drop(object.insert("items".into(), other)),
        }
        Ok::<_, ApiError>(Value::Object(object))
    })?;
    Ok(HttpResponse::Ok().json(value))
}

pub async fn overview(dashboard: Page) -> Result<HttpResponse, ApiError> {
    answer(&dashboard, |view| Ok(Value::Object(dashboard.inner.overview(view))))
}

#[derive(Deserialize)]
pub struct HistoryQuery {
    range: Option<u64>,
    step: Option<u64>,
}

pub async fn history(dashboard: Page, query: web::Query<HistoryQuery>) -> Result<HttpResponse, ApiError> {
    let coarse = query.step.is_some_and(|step| step >= COARSE_S);
    answer(&dashboard, |view| {
        let samples = view.books.history.last(query.range.unwrap_or(600), coarse);
        let mut columns = Map::new();
        columns.insert("ts".into(), samples.iter().map(|sample| json!(sample.ts)).collect());
        for (line, name) in LINES.iter().enumerate() {
            columns.insert((*name).into(), samples.iter().map(|sample| rounded(sample.values[line])).collect());
        }
        Ok(Value::Object(columns))
    })
}

/// A sample as the stream tells it.
pub fn sample(sample: &Sample) -> Value {
    let values = LINES.iter().zip(sample.values).map(|(name, value)| ((*name).to_owned(), rounded(value)));
    let mut object: Map<String, Value> = values.collect();
    object.insert("ts".into(), sample.ts.into());
    Value::Object(object)
}

fn rounded(value: Option<f64>) -> Value {
    value.map_or(Value::Null, |value| json!((value * 10.0).round() / 10.0))
}

#[derive(Deserialize)]
pub struct MapQuery {
    tier: Option<String>,
}

pub async fn map(dashboard: Page, query: web::Query<MapQuery>) -> Result<HttpResponse, ApiError> {
    let tier = match query.tier.as_deref() {
        None | Some("device") => Tier::Device,
        Some("host") => Tier::Host,
        Some("disk") => Tier::Disk,
        Some(_) => return Err(ApiError::invalid_value("tier", "`tier` must be device, host or disk")),
    };
    answer(&dashboard, |view| Ok(view.map(tier)))
}

pub async fn tenants(dashboard: Page) -> Result<HttpResponse, ApiError> {
    answer(&dashboard, |view| Ok(view.tenants()))
}

#[derive(Deserialize)]
pub struct SessionsQuery {
    sort: Option<String>,
    tenant: Option<String>,
    state: Option<String>,
    q: Option<String>,
    after: Option<String>,
    limit: Option<usize>,
}

/// A tenant by its name; one that nobody has has nothing.
fn tenant(view: &View<'_>, name: Option<&str>) -> Result<Option<TenantId>, ApiError> {
    match name.filter(|name| !name.is_empty()) {
        None => Ok(None),
        Some(name) => match view.tenant_named(name) {
            Some(tenant) => Ok(Some(tenant)),
            None => Err(ApiError::invalid_value("tenant", format!("there is no tenant `{name}`"))),
        },
    }
}

pub async fn sessions(dashboard: Page, query: web::Query<SessionsQuery>) -> Result<HttpResponse, ApiError> {
    let sort = query.sort.as_deref().unwrap_or("-idle");
    let (sort, descending) = sort.strip_prefix('-').map_or((sort, false), |sort| (sort, true));
    let by_rank = sort == "rank";
    let named = if by_rank { Some(Sort::Idle) } else { Sort::named(sort) };
    let sort = named.ok_or_else(|| {
        ApiError::invalid_value(
            "sort",
            "`sort` must be idle, tokens, device, return, turns or rank, with `-` for the most first",
        )
    })?;
    let state = query.state.as_deref().filter(|state| !state.is_empty());
    let pinned = state == Some("pinned");
    let state = state.filter(|_| !pinned).map(|name| {
        State::ALL.into_iter().find(|state| state.name() == name).ok_or_else(|| {
            ApiError::invalid_value("state", "`state` must be running, reloading, hot, warm, cold, none or pinned")
        })
    });
    let state = state.transpose()?;
    let after = query.after.as_deref().filter(|after| !after.is_empty());
    let after = after
        .map(|after| cursor(after).ok_or_else(|| ApiError::invalid_value("after", "`after` is no cursor of this list")))
        .transpose()?;
    let limit = query.limit.unwrap_or(100).clamp(1, 100);
    let digits = query.q.as_deref().map(|q| q.trim().to_ascii_lowercase()).filter(|q| !q.is_empty());
    answer(&dashboard, |view| {
        let tenant = tenant(view, query.tenant.as_deref())?;
        let descending = descending || by_rank;
        let asked = Query { tenant, state, pinned, sort, descending, after, limit };
        let index = &view.books.index;
        let mut page = match &digits {
            // What is no beginning of an id is that of none.
            Some(digits) => index.search(digits.strip_prefix("conv_").unwrap_or(digits), &asked).unwrap_or_default(),
            None => index.page(&asked),
        };
        if by_rank && digits.is_none() {
            // Those that go next come first, and then whoever has been idle the longest.
            page.rows.retain(|key| view.books.rank(*key).is_none());
            if after.is_none() {
                let fits = |key: &KvKey| {
                    index.get(*key).is_some_and(|row| {
                        tenant.is_none_or(|of| of == row.tenant)
                            && state.is_none_or(|of| of == row.state)
                            && (!pinned || row.pinned)
                    })
                };
                let first = view.books.accounts.line.iter().map(|next| next.key).filter(fits);
                page.rows = first.chain(page.rows).collect();
            }
        }
        let items: Vec<Value> = page.rows.iter().filter_map(|key| Some(view.row(*key, index.get(*key)?))).collect();
        let next = page.next.map(|Cursor(value, key)| format!("{value:x}.{:x}", key.0));
        Ok(json!({"total": page.total, "next": next, "truncated": page.truncated, "items": items}))
    })
}

fn cursor(text: &str) -> Option<Cursor> {
    let (value, key) = text.split_once('.')?;
    Some(Cursor(u64::from_str_radix(value, 16).ok()?, KvKey(u128::from_str_radix(key, 16).ok()?)))
}

pub async fn session(dashboard: Page, id: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let key = key_of(&id)?;
    answer(&dashboard, |view| {
        let row = view.books.index.get(key).ok_or_else(ApiError::conversation_not_found)?;
        Ok(view.session(key, row))
    })
}

/// The conversation of an id; what is no id is nobody's.
pub fn key_of(id: &str) -> Result<KvKey, ApiError> {
    ids::parse_conversation(id).map(|id| KvKey(id.0)).ok_or_else(ApiError::conversation_not_found)
}

#[derive(Deserialize)]
pub struct EvictionsQuery {
    after: Option<u64>,
    limit: Option<usize>,
    tenant: Option<String>,
    session: Option<String>,
    kind: Option<String>,
    rule: Option<String>,
    /// Milliseconds since 1970.
    since: Option<i64>,
    format: Option<String>,
}

pub async fn evictions(dashboard: Page, query: web::Query<EvictionsQuery>) -> Result<HttpResponse, ApiError> {
    let lines = match query.format.as_deref() {
        None | Some("json") => false,
        Some("jsonl") => true,
        Some(_) => return Err(ApiError::invalid_value("format", "`format` must be json or jsonl")),
    };
    let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let session = text(&query.session).map(|id| key_of(&id)).transpose()?;
    let most = if lines { 10_000 } else { 200 };
    let find = |view: &View<'_>| {
        let zero = view.books.ms(Tick(0));
        let since = query.since.map(|ms| Tick(u64::try_from(ms - zero).unwrap_or(0) * 1000));
        let asked = journal::Query {
            tenant: tenant(view, query.tenant.as_deref())?,
            session,
            kind: text(&query.kind),
            rule: text(&query.rule),
            before: query.after,
            since,
            limit: query.limit.unwrap_or(if lines { most } else { 100 }).clamp(1, most),
        };
        let (found, has_more) = view.books.journal.find(&asked);
        let next = found.last().filter(|_| has_more).map(|entry| entry.number);
        Ok::<_, ApiError>((found.into_iter().map(|entry| view.entry(entry)).collect::<Vec<_>>(), next))
    };
    if lines {
        let (found, _) = dashboard.inner.read(find)?;
        let text: String = found.iter().map(|entry| format!("{entry}\n")).collect();
        let name = ("content-disposition", "attachment; filename=\"journal.jsonl\"");
        return Ok(HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, "application/jsonl"))
            .insert_header(name)
            .body(text));
    }
    answer(&dashboard, |view| {
        let (items, next) = find(view)?;
        let mut by_rule: Map<String, Value> = Map::new();
        let since = Tick(view.books.now.0.saturating_sub(15 * MINUTE_US));
        for entry in view.books.journal.since(since).filter(|entry| entry.freed_blocks > 0) {
            let so_far = by_rule.get(entry.rule).and_then(Value::as_u64).unwrap_or(0);
            by_rule.insert(entry.rule.into(), (so_far + 1).into());
        }
        Ok(json!({"items": items, "next": next, "by_rule": by_rule}))
    })
}

pub async fn policy(dashboard: Page) -> Result<HttpResponse, ApiError> {
    answer(&dashboard, |view| Ok(view.policy()))
}

#[derive(Deserialize)]
pub struct StreamQuery {
    after: Option<u64>,
    boot: Option<String>,
    watch: Option<String>,
}

/// GET `/stream`: what changes, as it does.
pub async fn stream(
    request: HttpRequest,
    dashboard: Page,
    api: Api,
    who: Who,
    query: web::Query<StreamQuery>,
) -> Result<HttpResponse, ApiError> {
    let last = request.headers().get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let watches = query.watch.clone().filter(|id| !id.is_empty());
    let hz = u32::try_from(1000 / EVERY.as_millis()).unwrap_or(1);
    let heard = dashboard.inner.events.listen(who.login, query.boot.as_deref(), last.or(query.after), watches, hz);
    let (first, reader) = heard.map_err(|_| ApiError::too_many_streams())?;
    let first = stream::iter(first);
    let then = stream::unfold(reader, |mut reader| async { Some((reader.recv().await?, reader)) });
    let events = futures_util::StreamExt::chain(first, then);
    let texts = futures_util::StreamExt::map(events, |text| text.to_string());
    Ok(sse::respond(texts, api.settings.keep_alive))
}
