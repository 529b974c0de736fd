//! Do tenants stay apart, and does the file that names them rule at once?

use std::path::PathBuf;
use std::time::Duration;

use rekindle::api::routes::{Access, ROUTES};
use rekindle::tenants::key::{KeyHash, KeyKind, generate};
use serde_json::{Value, json};

use super::client::Client;
use super::server::{Home, Server, eventually, machine};
use super::socket::Socket;
use super::workload::BLOCK_BYTES;

/// Longest time from an edit of the tenants file to its effect.
const HEARD: Duration = Duration::from_secs(5);

/// Two tenants and an admin, with their keys.
pub struct Tenants {
    file: PathBuf,
    pub a: String,
    pub b: String,
    pub admin: String,
}

impl Tenants {
    pub fn new(home: &Home) -> Self {
        let (a, b, admin) = (generate(KeyKind::Tenant), generate(KeyKind::Tenant), generate(KeyKind::Admin));
        let tenants = Self { file: home.data().with_file_name("tenants.toml"), a, b, admin };
        tenants.write("", "");
        tenants
    }

    /// Writes the file, with more about each tenant.
    pub fn write(&self, of_a: &str, of_b: &str) {
        let hash = |key: &str| KeyHash::of(key).hex();
        let text = format!(
            "admin_key = [{{ sha256 = \"{}\" }}]\n\
             [[tenant]]\nid = \"a\"\nkeys = [{{ sha256 = \"{}\" }}]\n{of_a}\n\
             [[tenant]]\nid = \"b\"\nkeys = [{{ sha256 = \"{}\" }}]\n{of_b}\n",
            hash(&self.admin),
            hash(&self.a),
            hash(&self.b),
        );
        std::fs::write(&self.file, text).unwrap();
    }

    /// Where the file is.
    pub fn setting(&self) -> String {
        format!("tenants.file={}", self.file.display())
    }

    /// Room for one window and no more, so that nobody has a floor.
    pub fn settings(&self) -> Vec<String> {
        vec![self.setting(), format!("kv.device_bytes={}", 128 * BLOCK_BYTES), "kv.host_bytes=0".to_owned()]
    }

    /// Starts a server of theirs.
    pub fn serve<'home>(&self, home: &'home Home, settings: &[String]) -> Served<'home> {
        let server = Server::start(home, settings);
        let [a, b, admin] = [&self.a, &self.b, &self.admin].map(|key| Client::with_key(&server.url, key));
        Served { server, a, b, admin }
    }
}

/// A server of two tenants, and who talks to it.
pub struct Served<'home> {
    pub server: Server<'home>,
    pub a: Client,
    pub b: Client,
    pub admin: Client,
}

/// What an answer says, as far as it could tell one tenant of another.
#[derive(Debug, PartialEq)]
struct Seen {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Seen {
    async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let own = ["date", "x-request-id", "openai-processing-ms"];
        let headers = response.headers().iter().filter(|(name, _)| !own.contains(&name.as_str()));
        let mut headers: Vec<(String, String)> =
            headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
        headers.sort();
        Self { status, headers, body: response.text().await.unwrap() }
    }

    fn code(&self) -> String {
        let body: Value = serde_json::from_str(&self.body).unwrap_or_default();
        body["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// An id like another, that never was.
fn unlike(id: &str) -> String {
    let last = if id.ends_with('0') { '1' } else { '0' };
    format!("{}{last}", &id[..id.len() - 1])
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_ids_are_as_if_they_never_were_on_every_route() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server, a, b, .. } = tenants.serve(&home, &tenants.settings());

    let conversation = a.conversation().await;
    let turn = a.turn(&conversation, Some("My name is Ada.")).send().await.unwrap();
    let response: Value = turn.json().await.unwrap();
    let response = response["id"].as_str().unwrap().to_owned();
    let item = a.items(&conversation).await[0].id.clone();
    let before = a.items(&conversation).await;

    let mut compared = 0;
    for route in ROUTES.iter().filter(|route| route.path.contains('{') && route.path != "/v1/models/{id:.+}") {
        assert_eq!(route.access, Access::Tenant, "{}: a route with ids", route.path);
        let owner = if route.path.starts_with("/v1/responses/") { &response } else { &conversation };
        let fill = |id: &str| {
            let path = route.path.split('/').map(|part| match part {
                "{id}" => id,
                part if part.starts_with('{') => item.as_str(),
                part => part,
            });
            path.collect::<Vec<_>>().join("/")
        };
        for method in route.methods {
            for body in [json!({}), json!({"metadata": {"a": "b"}, "items": [{"role": "user", "content": "x"}]})] {
                let ask = async |id: &str| {
                    let request = b.request(method, &fill(id));
                    Seen::of(if *method == "POST" { request.json(&body) } else { request }).await
                };
                let (foreign, never) = (ask(owner).await, ask(&unlike(owner)).await);
                assert_eq!(foreign, never, "{method} {}", route.path);
                assert!((400..500).contains(&foreign.status), "{method} {}: {foreign:?}", route.path);
                compared += 1;
            }
        }
    }
    assert!(compared >= 10, "only {compared} requests were compared");

    // Ids in a body, and in a query.
    let own = b.conversation().await;
    for name in ["conversation", "previous_response_id"] {
        let id = if name == "conversation" { &conversation } else { &response };
        let ask = async |id: &str| Seen::of(b.post("/v1/responses", &json!({name: id, "input": "x"}))).await;
        assert_eq!(ask(id).await, ask(&unlike(id)).await, "{name}");
    }
    let ask = async |item: &str| Seen::of(b.get(&format!("/v1/conversations/{own}/items?after={item}"))).await;
    assert_eq!(ask(&item).await.code(), ask(&unlike(&item)).await.code());

    assert_eq!(a.items(&conversation).await, before, "the other tenant changed something");
    assert_eq!(b.items(&own).await, [], "the other tenant got something");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_equal_prefix_of_another_tenant_is_never_found_whatever_the_request_says() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server, a, b, .. } = tenants.serve(&home, &tenants.settings());
    let model = a.json(a.get("/v1/models")).await["data"][0]["id"].clone();
    let said = "The harbour lantern swings above the copper river. ".repeat(12);
    let chat = json!({"model": model, "messages": [{"role": "user", "content": said}], "max_tokens": 1,
        "user": "shared", "prompt_cache_key": "shared", "cache_salt": "shared"});
    let cached = async |client: &Client| {
        let answer = client.json(client.post("/v1/chat/completions", &chat)).await;
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(&a).await, 0);
    assert!(cached(&a).await > 100, "a repeat finds its own");
    assert_eq!(cached(&b).await, 0, "a tenant found what another had said");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_key_opens_its_own_routes_and_nothing_else() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    tenants.write("", "status = \"suspended\"");
    let server = Server::start(&home, &tenants.settings());
    let nobody = Client::of(&server.url);
    let stranger = Client::with_key(&server.url, "rk_0000");
    let [a, b, admin] = [&tenants.a, &tenants.b, &tenants.admin].map(|key| Client::with_key(&server.url, key));

    for route in ROUTES {
        let path = route.path.replace("{id:.+}", "{id}");
        for method in route.methods {
            let ask = async |client: &Client| Seen::of(client.request(method, &path)).await;
            let name = format!("{method} {path}");
            match route.access {
                Access::Open => assert!(ask(&nobody).await.status < 400, "{name}"),
                Access::Tenant | Access::Reader => {
                    for client in [&nobody, &stranger] {
                        let seen = ask(client).await;
                        assert_eq!((seen.status, seen.header("www-authenticate")), (401, Some("Bearer")), "{name}");
                        assert_eq!(seen.code(), "invalid_api_key", "{name}");
                    }
                    let wrong = if route.access == Access::Tenant { &admin } else { &a };
                    let seen = ask(wrong).await;
                    assert_eq!((seen.status, seen.code().as_str()), (403, "wrong_key_kind"), "{name}");
                }
            }
            if route.access == Access::Tenant {
                let seen = ask(&b).await;
                assert_eq!((seen.status, seen.code().as_str()), (403, "tenant_suspended"), "{name}");
            }
        }
    }
    assert_eq!(Seen::of(admin.get("/metrics")).await.status, 200);
    // However the path is written, the key is asked for.
    for path in ["//metrics", "/metrics/", "/%6Detrics", "/admin/api/tenants", "/v1/%6Dodels", "//v1//models/"] {
        assert_eq!(Seen::of(nobody.get(path)).await.status, 401, "{path}");
    }
    assert_eq!(Seen::of(admin.get("/admin/api/nothing")).await.code(), "unknown_url");
    assert_eq!(Seen::of(a.get("/admin/api/nothing")).await.code(), "wrong_key_kind");
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_the_tenants_file_applies_at_once_and_a_bad_one_changes_nothing() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server: _server, a, b, admin } = tenants.serve(&home, &tenants.settings());
    let conversation = a.conversation().await;
    let until = async |what: &str, client: &Client, code: &str| {
        eventually(HEARD, what, async || {
            let seen = Seen::of(client.get("/v1/models")).await;
            (seen.code() == code).then_some(seen)
        })
        .await
    };

    tenants.write("limits = { requests_per_minute = 0 }", "models = []");
    let refused = until("a tenant has no requests left", &a, "rate_limit_exceeded").await;
    assert_eq!((refused.status, refused.header("x-ratelimit-limit-requests")), (429, Some("0")));
    let body = json!({"conversation": conversation, "input": "x"});
    assert_eq!(Seen::of(b.post("/v1/responses", &json!({"input": "x"}))).await.code(), "model_not_allowed");
    assert_eq!(b.json(b.get("/v1/models")).await["data"], json!([]));

    tenants.write("limits = { requests_per_minute = 100, concurrent_turns = 0 }", "");
    until("a tenant has requests again", &a, "").await;
    let seen = Seen::of(a.post("/v1/responses", &body)).await;
    assert_eq!((seen.status, seen.code().as_str()), (429, "concurrency_limit_exceeded"));
    assert_eq!((seen.header("retry-after"), seen.header("retry-after-ms")), (Some("1"), Some("1000")));
    assert_eq!(seen.header("x-ratelimit-limit-requests"), Some("100"));
    let left: u32 = seen.header("x-ratelimit-remaining-requests").unwrap().parse().unwrap();
    assert!(left < 100, "{left} of 100 are left");
    assert!(seen.header("x-ratelimit-reset-requests").unwrap().ends_with('s'));
    assert_eq!(Seen::of(b.get("/v1/models")).await.header("x-ratelimit-limit-requests"), None);

    let page = admin.get("/metrics").send().await.unwrap().text().await.unwrap();
    for line in [
        "rekindle_limited_total{tenant=\"a\",limit=\"concurrent_turns\"} 1\n",
        "rekindle_limited_total{tenant=\"a\",limit=\"requests_per_minute\"} ",
    ] {
        assert!(page.contains(line), "{line} is not on the metrics page");
    }

    // A mistake keeps the old file in force.
    std::fs::write(&tenants.file, "[[tenant]]\nid = \"a\"\nweight = -1").unwrap();
    eventually(HEARD, "the bad edit is counted", async || {
        let page = admin.get("/metrics").send().await.unwrap().text().await.unwrap();
        page.contains("rekindle_tenants_file_edits_total{outcome=\"refused\"} 1").then_some(())
    })
    .await;
    assert_eq!(Seen::of(a.post("/v1/responses", &body)).await.code(), "concurrency_limit_exceeded");
    let log = home.logged();
    assert!(log.contains("an edit of the tenants file was refused") && log.contains("tenant[0].weight"), "{log}");

    // A removed key stops working, and comes back to the same conversations.
    std::fs::write(&tenants.file, "").unwrap();
    until("a removed key stops working", &a, "invalid_api_key").await;
    tenants.write("", "");
    until("a key works again", &a, "").await;
    a.say(&conversation, "Hello.").await;
    assert_eq!(a.items(&conversation).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_tenants_file_any_key_will_do_and_admins_have_one_in_the_data_folder() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &["kv.host_bytes=0".to_owned()]);
    for client in [Client::of(&server.url), Client::with_key(&server.url, "none")] {
        assert_eq!(Seen::of(client.get("/v1/models")).await.status, 200);
        assert_eq!(Seen::of(client.get("/metrics")).await.status, 200);
        assert_eq!(Seen::of(client.get("/admin/api/nothing")).await.code(), "invalid_api_key");
    }
    let key = std::fs::read_to_string(home.data().join("admin.key")).unwrap();
    let admin = Client::with_key(&server.url, key.trim());
    assert_eq!(Seen::of(admin.get("/admin/api/nothing")).await.code(), "unknown_url");
    server.finish().await;

    // Whoever can reach another address needs a key.
    let said = home.serve_at("0.0.0.0:0", &[]).output().unwrap();
    assert!(!said.status.success());
    assert!(String::from_utf8_lossy(&said.stderr).contains("--tenants FILE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_is_suspended_loses_its_sockets_whatever_they_run() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let server = Server::start(&home, &tenants.settings());
    let key = format!("Bearer {}", tenants.a);
    let opened = Socket::try_open(&server.url, "/v1/responses", &[("Authorization", &key)]).await;
    let Ok(mut socket) = opened else { panic!("no socket for a tenant's key") };
    let long = json!({"type": "response.create", "input": "Hi.", "max_output_tokens": 1500, "ignore_eos": true});
    socket.send(&long).await;
    socket.until(&["response.output_text.delta"]).await;
    tenants.write("status = \"suspended\"", "");
    assert_eq!(socket.goodbye().await, Some(1008));
    server.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_open_heeds_what_the_tenants_file_says_by_now() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let Served { server, a, b, .. } = tenants.serve(&home, &tenants.settings());
    let open = async |key: &str| {
        let key = format!("Bearer {key}");
        let opened = Socket::try_open(&server.url, "/v1/responses", &[("Authorization", &key)]).await;
        opened.unwrap_or_else(|refused| panic!("no socket for a tenant's key: {refused:?}"))
    };
    let (mut of_a, mut of_b) = (open(&tenants.a).await, open(&tenants.b).await);
    tenants.write("limits = { requests_per_minute = 0 }", "models = []");
    eventually(HEARD, "the edit applies", async || {
        let of_a = Seen::of(a.get("/v1/models")).await.code();
        let models = b.json(b.get("/v1/models")).await["data"].clone();
        (of_a == "rate_limit_exceeded" && models == json!([])).then_some(())
    })
    .await;
    let create = json!({"type": "response.create", "input": "Hi.", "max_output_tokens": 1});
    for (socket, status, code) in [(&mut of_a, 429, "rate_limit_exceeded"), (&mut of_b, 403, "model_not_allowed")] {
        socket.send(&create).await;
        let event = socket.event().await;
        assert_eq!((&event["status"], &event["error"]["code"]), (&json!(status), &json!(code)), "{event}");
    }
    server.finish().await;
}
