//! Who asks, and may he?
//!
//! An admin key as a bearer, for scripts, or the cookie of a login, for the page. What a page asks to be done must come from
//! the page: its origin is this host, and it knows the login's token.

use std::net::IpAddr;
use std::time::Instant;

use actix_web::body::BoxBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::{CACHE_CONTROL, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage, HttpRequest, HttpResponse, ResponseError, web};
use serde_json::json;

use super::logins::{Actor, actor_name};
use super::{Api, Dashboard};
use crate::api::auth::bearer;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::api::{body, unix_now};

const CSRF: &str = "x-rk-csrf";
const REFERRER_POLICY: HeaderName = HeaderName::from_static("referrer-policy");
const CONTENT_TYPE_OPTIONS: HeaderName = HeaderName::from_static("x-content-type-options");
const LOGIN_S: u32 = 12 * 3600;

/// Who a request is from.
pub type Who = web::ReqData<Actor>;

/// Before all that is under `/admin/api`, but for logging in.
pub async fn admin(
    api: Api,
    dashboard: web::Data<Dashboard>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let actor = match actor(&api, &dashboard, request.request()) {
        Ok(actor) => actor,
        Err(error) => return Ok(request.into_response(error.error_response())),
    };
    let is_change = request.method() == Method::POST;
    if is_change
        && let Some(csrf) = &actor.csrf
        && let Err(error) = from_the_page(request.headers(), csrf)
    {
        return Ok(request.into_response(error.error_response()));
    }
    request.extensions_mut().insert(actor);
    let mut response = next.call(request).await?;
    guard(response.headers_mut());
    Ok(response)
}

fn actor(api: &Api, dashboard: &Dashboard, request: &HttpRequest) -> Result<Actor, ApiError> {
    if let Some(key) = bearer(request.headers()) {
        api.tenants.check_admin(Some(key), unix_now())?;
        return Ok(Actor { name: actor_name(key), login: 0, csrf: None });
    }
    let secret = cookie(request.headers(), cookie_name(dashboard)).ok_or_else(ApiError::login_required)?;
    dashboard.inner.logins.find(secret, Instant::now()).ok_or_else(ApiError::login_required)
}

/// What every answer about conversations bears: nobody keeps it, and it is what it says.
pub fn guard(headers: &mut HeaderMap) {
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
}

fn from_the_page(headers: &HeaderMap, csrf: &str) -> Result<(), ApiError> {
    if !is_own_origin(headers) {
        return Err(ApiError::csrf_failed("this comes from another origin than the page's; open /admin on this host"));
    }
    let sent = headers.get(CSRF).and_then(|value| value.to_str().ok());
    if sent == Some(csrf) {
        Ok(())
    } else {
        Err(ApiError::csrf_failed("the page's token is not this login's; reload it"))
    }
}

/// Whether a request says that it comes from a page of this host.
fn is_own_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let host = text(HOST);
    let origin = text(ORIGIN).and_then(|origin| origin.split_once("://"));
    origin.is_some_and(|(_, origin)| Some(origin) == host)
}

fn cookie_name(dashboard: &Dashboard) -> &'static str {
    if dashboard.inner.settings.secure_cookie { "__Host-rk_admin" } else { "rk_admin" }
}

fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let pairs = headers.get_all(COOKIE).filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(';'));
    pairs.filter_map(|pair| pair.trim().split_once('=')).find(|(of, _)| *of == name).map(|(_, value)| value)
}

fn set_cookie(dashboard: &Dashboard, secret: &str, lasts_s: u32) -> String {
    let secure = if dashboard.inner.settings.secure_cookie { "; Secure" } else { "" };
    format!("{}={secret}; Path=/; HttpOnly; SameSite=Strict; Max-Age={lasts_s}{secure}", cookie_name(dashboard))
}

/// POST `/admin/api/login {key}`: an admin key for a cookie.
pub async fn login(
    request: HttpRequest,
    payload: web::Payload,
    api: Api,
    dashboard: web::Data<Dashboard>,
) -> Result<HttpResponse, ApiError> {
    let has_origin = request.headers().contains_key(ORIGIN);
    if has_origin && !is_own_origin(request.headers()) {
        return Err(ApiError::csrf_failed("this comes from another origin than the page's; open /admin on this host"));
    }
    let address = request.peer_addr().map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.ip());
    let (logins, now) = (&dashboard.inner.logins, Instant::now());
    if let Some(wait) = logins.must_wait(address, now) {
        return Err(ApiError::too_many_tries(wait));
    }
    let parsed = body::object(&request, payload, &api.settings.limits).await?;
    let mut fields = Fields::of(&parsed);
    let key = fields.string("key")?.ok_or_else(|| ApiError::missing("key"))?;
    if api.tenants.check_admin(Some(key), unix_now()).is_err() {
        logins.note_failure(address, now);
        tracing::warn!(%address, key = actor_name(key), "a login with a key that is no admin's");
        return Err(ApiError::invalid_admin_key());
    }
    let secret = logins.begin(key, address, now);
    tracing::info!(%address, actor = actor_name(key), "an operator logged in");
    let mut response = HttpResponse::Ok()
        .insert_header(("set-cookie", set_cookie(&dashboard, &secret, LOGIN_S)))
        .json(json!({"ok": true}));
    guard(response.headers_mut());
    Ok(response)
}

/// POST `/admin/api/logout`.
pub async fn logout(request: HttpRequest, dashboard: web::Data<Dashboard>) -> HttpResponse {
    if let Some(secret) = cookie(request.headers(), cookie_name(&dashboard)) {
        dashboard.inner.logins.end(secret);
    }
    HttpResponse::Ok().insert_header(("set-cookie", set_cookie(&dashboard, "", 0))).json(json!({"ok": true}))
}

/// GET `/admin/api/me`.
pub async fn me(who: Who, dashboard: web::Data<Dashboard>) -> HttpResponse {
    let settings = &dashboard.inner.settings;
    HttpResponse::Ok().json(json!({
        "actor": who.name,
        "csrf": who.csrf,
        "read_only": settings.read_only,
        "secure": settings.secure_cookie,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn only_the_page_itself_may_ask_for_changes() {
        let asks = |pairs: &[(&'static str, &'static str)]| from_the_page(&headers(pairs), "token").is_ok();
        let (host, own, csrf) = (("host", "h:1"), ("origin", "https://h:1"), ("x-rk-csrf", "token"));
        assert!(asks(&[host, own, csrf]));
        assert!(!asks(&[host, csrf]), "no origin");
        assert!(!asks(&[host, ("origin", "https://evil"), csrf]));
        assert!(!asks(&[host, ("origin", "null"), csrf]));
        assert!(!asks(&[host, own]), "no token");
        assert!(!asks(&[host, own, ("x-rk-csrf", "other")]));
    }

    #[test]
    fn a_cookie_is_found_among_others_by_its_whole_name() {
        let found = |text: &'static str| cookie(&headers(&[("cookie", text)]), "rk_admin").map(str::to_owned);
        assert_eq!(found("a=1; rk_admin=s; b=2").as_deref(), Some("s"));
        assert_eq!(found("xrk_admin=s"), None);
        assert_eq!(found(""), None);
    }
}
