//! Do a real Prometheus and Redis, with the files that we give operators, answer what they are asked?
//!
//! The processes of docker-compose.yml without their containers: the same flags and files, other ports and folders.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rekindle::config::Layers;
use serde_json::{Value, json};
use tempfile::TempDir;
use yaml_rust2::{Yaml, YamlLoader};

use super::client::Client;
use super::server::{Home, Server, eventually, machine, program};
use super::socket::Socket;
use super::tenants::Tenants;
use super::workload::BLOCK_BYTES;

/// Within this a scraped series is there, and what is asked of it has an answer.
const ANSWERED: Duration = Duration::from_secs(15);
const CONVERSATIONS: usize = 4;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

fn compose() -> Yaml {
    YamlLoader::load_from_str(&read("docker-compose.yml")).unwrap().remove(0)
}

fn texts(list: &Yaml) -> Vec<&str> {
    list.as_vec().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

/// `${NAME:-default}` as a shell without NAME has it.
fn with_defaults(text: &str) -> String {
    let mut done = text.to_owned();
    while let Some((before, rest)) = done.clone().split_once("${") {
        let (variable, after) = rest.split_once('}').unwrap();
        done = format!("{before}{}{after}", variable.split_once(":-").map_or("", |(_, default)| default));
    }
    done
}

#[track_caller]
fn promtool(arguments: &[&str], folder: &Path) {
    let said = Command::new("promtool").args(arguments).current_dir(folder).output().unwrap();
    let text = [said.stdout, said.stderr].concat();
    assert!(said.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&text));
}

/// A running Prometheus, which ends with its test.
struct Prometheus {
    child: Child,
    url: String,
    http: reqwest::Client,
    folder: TempDir,
}

impl Prometheus {
    /// Starts one with the flags of docker-compose.yml, which scrapes this server as an admin.
    async fn start(server: &Server<'_>, key: &str) -> Self {
        let folder = TempDir::with_prefix("rekindle-prometheus-").unwrap();
        let server = server.url.strip_prefix("http://").unwrap();
        let mut config = read("config/prometheus.yml");
        for (ours, theirs) in [
            ("127.0.0.1:8080", server),
            ("scrape_interval: 5s", "scrape_interval: 500ms"),
            ("evaluation_interval: 5s", "evaluation_interval: 1s"),
            // As the file says that it is to be done with a tenants file.
            ("# authorization:", "authorization:"),
            ("#   credentials_file:", "  credentials_file:"),
        ] {
            assert_eq!(config.matches(ours).count(), 1, "{ours} in {config}");
            config = config.replace(ours, theirs);
        }
        std::fs::write(folder.path().join("prometheus.yml"), config).unwrap();
        std::fs::write(folder.path().join("alerts.yml"), read("config/alerts.yml")).unwrap();
        std::fs::write(folder.path().join("admin.key"), key).unwrap();
        promtool(&["check", "config", "prometheus.yml"], folder.path());

        // Nobody else takes the port in the moment between.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let compose = compose();
        let flags = texts(&compose["services"]["prometheus"]["command"]).into_iter().map(|flag| {
            let (name, value) = flag.split_once('=').unwrap();
            let value = match name {
                "--config.file" => path("prometheus.yml"),
                "--storage.tsdb.path" => path("data"),
                "--web.listen-address" => address.clone(),
                _ => value.to_owned(),
            };
            format!("{name}={value}")
        });
        let log = std::fs::File::create(path("log")).unwrap();
        let child =
            Command::new("prometheus").args(flags).stdout(Stdio::null()).stderr(log).stdin(Stdio::null()).spawn();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let prometheus = Self { child: child.unwrap(), url: format!("http://{address}"), http, folder };
        eventually(ANSWERED, "prometheus is ready", async || {
            let ready = prometheus.http.get(format!("{}/-/ready", prometheus.url)).send().await;
            ready.is_ok_and(|answer| answer.status().is_success()).then_some(())
        })
        .await;
        prometheus
    }

    /// What it answers, as data; an error fails the test.
    async fn ask(&self, path: &str, query: &[(&str, &str)]) -> Value {
        let url = reqwest::Url::parse_with_params(&format!("{}/api/v1/{path}", self.url), query).unwrap();
        let answer: Value = self.http.get(url).send().await.unwrap().json().await.unwrap();
        assert_eq!(answer["status"], "success", "{query:?}: {answer}");
        answer["data"].clone()
    }

    /// The series that an expression gives, once there are some.
    async fn series(&self, expression: &str) -> Vec<Value> {
        let what = format!("there are series for {expression}");
        eventually(ANSWERED, &what, async || {
            let data = self.ask("query", &[("query", expression)]).await;
            data["result"].as_array().filter(|series| !series.is_empty()).cloned()
        })
        .await
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            eprintln!("--- prometheus said\n{log}");
        }
    }
}

/// An expression without what it compares with numbers: what an alert looks at.
fn without_thresholds(expression: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut words = expression.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let compares = ["==", "!=", ">", "<", ">=", "<="].contains(&word);
        if compares && words.peek().is_some_and(|next| next.parse::<f64>().is_ok()) {
            words.next();
        } else {
            kept.push(word);
        }
    }
    kept.join(" ")
}

/// The board's queries by panel, as Grafana would send them.
fn board() -> Vec<(String, String)> {
    let board: Value = serde_json::from_str(&read("config/grafana/dashboards/rekindle.json")).unwrap();
    let mut queries = Vec::new();
    for panel in board["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
        assert!(
            !targets.is_empty() || ["row", "text"].contains(&panel["type"].as_str().unwrap()),
            "{title} asks nothing"
        );
        for target in targets {
            assert_eq!(target["datasource"]["uid"], "prometheus", "{title}");
            let query = target["expr"].as_str().unwrap();
            let query = query.replace("$__rate_interval", "30s").replace("$instance", ".*").replace("$tenant", ".*");
            assert!(!query.contains('$'), "{title}: {query}");
            queries.push((title.clone(), query));
        }
    }
    queries
}

/// Two tenants whose conversations don't fit the device tier, so that those that go on come back from the host's.
async fn load(server: &Server<'_>, tenants: &Tenants) {
    let clients = [&tenants.a, &tenants.b].map(|key| Client::with_key(&server.url, key));
    let mut conversations = Vec::new();
    for client in clients.iter().cycle().take(CONVERSATIONS) {
        conversations.push((client, client.conversation().await));
    }
    let say = async |client: &Client, id: &str, said: &str, tokens: u32| {
        let body = json!({"conversation": id, "input": said, "max_output_tokens": tokens, "temperature": 0});
        client.json(client.post("/v1/responses", &body)).await
    };
    for (number, (client, id)) in conversations.iter().enumerate() {
        say(client, id, &format!("{number} lanterns swing above the river. ").repeat(60), 2).await;
    }
    for (client, id) in &conversations {
        say(client, id, "Why?", 2).await;
    }
    // A turn behind another that has no patience, a socket, and a path that nobody has.
    let (client, id) = &conversations[0];
    let long = json!({"conversation": id, "input": "And then?", "max_output_tokens": 48, "stream": true});
    let running = client.post("/v1/responses", &long).send().await.unwrap();
    let impatient = client.post("/v1/responses", &json!({"conversation": id, "input": "Now!"}));
    let refused = impatient.header("x-stainless-read-timeout", "0.001").send().await.unwrap();
    assert_eq!(refused.status(), 503);
    running.text().await.unwrap();
    assert_eq!(client.get("/nothing").send().await.unwrap().status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_answers_every_panel_of_the_board_and_every_alert() {
    let _alone = machine().await;
    let home = Home::new();
    let tenants = Tenants::new(&home);
    let mut settings = vec![tenants.setting()];
    for (tier, blocks) in [("device", 100), ("host", 150), ("disk", 400)] {
        settings.push(format!("kv.{tier}_bytes={}", blocks * (BLOCK_BYTES + 4096)));
    }
    let server = Server::start(&home, &settings);
    let admin = Client::with_key(&server.url, &tenants.admin);
    // Whatever can be 0 is there before anything has happened; of requests, once there was one.
    admin.json(admin.get("/healthz")).await;
    let first = admin.get("/metrics").send().await.unwrap().text().await.unwrap();
    let documented = String::from_utf8(program(&["metrics"]).output().unwrap().stdout).unwrap();
    assert_eq!(documented, read("docs/metrics.md"));
    let names: Vec<&str> = documented.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    assert!(names.len() > 60, "{names:?}");
    for name in names {
        assert!(first.contains(&format!("# TYPE {name} ")), "{name} is not in the first scrape");
    }

    let prometheus = Prometheus::start(&server, &tenants.admin).await;
    prometheus.series("rekindle_engine_steps_total").await;
    load(&server, &tenants).await;
    let key = format!("Bearer {}", tenants.a);
    let opened = Socket::try_open(&server.url, "/v1/responses", &[("Authorization", &key)]).await;
    let Ok(socket) = opened else { panic!("no socket for a tenant's key") };
    let metrics = admin.metrics().await;
    assert!(metrics.count("rekindle_evictions_total") > 0 && metrics.prompt_tokens("reloaded_host") > 0, "{metrics:?}");
    // Two scrapes that saw all of it.
    prometheus.series("rekindle_websocket_connections == 1").await;
    prometheus.series("count_over_time((rekindle_websocket_connections == 1)[1m:500ms]) > 1").await;

    for (title, query) in board() {
        let series = prometheus.series(&query).await;
        assert!(series.len() < 100, "{title}: {} series are too many to read", series.len());
    }

    let rules = prometheus.ask("rules", &[]).await;
    let rules = rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap());
    let tested = read("tests/system/alerts.yml");
    let mut alerts = 0;
    for rule in rules {
        let name = rule["name"].as_str().unwrap();
        prometheus.series(&without_thresholds(rule["query"].as_str().unwrap())).await;
        for words in ["summary", "todo"] {
            assert!(rule["annotations"][words].as_str().is_some_and(|text| text.ends_with('.')), "{name}: {words}");
        }
        assert!(tested.contains(&format!("alertname=\"{name}\"")), "{name} was never seen to fire");
        alerts += 1;
    }
    assert!(alerts > 10);
    let unwell = eventually(ANSWERED, "the rules were evaluated", async || {
        let rules = prometheus.ask("rules", &[]).await.to_string();
        (!rules.contains("\"health\":\"unknown\"")).then_some(rules)
    })
    .await;
    assert!(!unwell.contains("\"health\":\"err\""), "{unwell}");
    drop(socket);
    server.finish().await;
}

/// Nothing uses it yet; that it can be used as it is run is what is seen here.
#[test]
fn redis_answers_with_the_arguments_that_compose_gives_it_and_keeps_what_it_is_told() {
    let folder = TempDir::with_prefix("rekindle-redis-").unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let compose = compose();
    let command = texts(&compose["services"]["redis"]["command"]);
    let ours = |argument: &&str| {
        if *argument == "/data" { folder.path().display().to_string() } else { (*argument).to_owned() }
    };
    let more = ["--bind", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned);
    let spawned = Command::new(command[0])
        .args(command[1..].iter().map(ours).chain(more))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    let mut redis = Ended(spawned.unwrap());
    let deadline = Instant::now() + ANSWERED;
    let mut connection = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(connection) => break connection,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    connection.set_read_timeout(Some(ANSWERED)).unwrap();
    let mut ask = |command: &str, answer: &str| {
        connection.write_all(command.as_bytes()).unwrap();
        let mut said = vec![0; answer.len()];
        connection.read_exact(&mut said).unwrap();
        assert_eq!(String::from_utf8_lossy(&said), answer);
    };
    ask("PING\r\n", "+PONG\r\n");
    ask("SET node alive\r\n", "+OK\r\n");
    let sent = Command::new("kill").args(["-TERM", &redis.0.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert!(redis.0.wait().unwrap().success());
    // `--appendonly yes --dir`: what it was told is where the volume is.
    let kept = std::fs::read_dir(folder.path().join("appendonlydir")).unwrap();
    let kept: Vec<u8> = kept.flat_map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect();
    assert!(String::from_utf8_lossy(&kept).contains("alive"));
}

/// A process that ends with its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn each_alert_fires_when_it_should_and_not_before() {
    promtool(&["check", "rules", "config/alerts.yml"], root());
    promtool(&["test", "rules", "tests/system/alerts.yml"], root());
}

#[test]
fn what_compose_runs_are_pinned_images_with_our_own_files_and_settings_that_there_are() {
    let compose = compose();
    let services = compose["services"].as_hash().unwrap();
    for (name, service) in services {
        let name = name.as_str().unwrap();
        let (_, tag) = service["image"].as_str().and_then(|image| image.rsplit_once(':')).expect(name);
        assert!(
            tag.matches('.').count() >= 2 && tag.starts_with(|c: char| c.is_ascii_digit() || c == 'v'),
            "{name}: {tag}"
        );
        // Nothing is published but on this machine's own address.
        assert!(service["ports"].is_badvalue(), "{name} publishes a port");
        for volume in texts(&service["volumes"]) {
            let source = volume.split(':').next().unwrap();
            let is_ours = source.starts_with("./");
            assert!(
                if is_ours { root().join(source).exists() } else { !compose["volumes"][source].is_badvalue() },
                "{volume}"
            );
        }
    }
    // Who scrapes looks where the server listens, and finds the alerts where they are mounted.
    let served = &compose["services"]["rekindle"];
    let command: Vec<String> = texts(&served["command"]).into_iter().map(with_defaults).collect();
    assert_eq!(command, ["serve", "--listen", "127.0.0.1:8080"]);
    assert!(read("config/prometheus.yml").contains("[\"127.0.0.1:8080\"]"));
    let environment = served["environment"].as_hash().unwrap().iter();
    let set =
        environment.map(|(key, value)| (key.as_str().unwrap().to_owned(), with_defaults(value.as_str().unwrap())));
    Layers::defaults().unwrap().environment(set).unwrap().build().unwrap();
    let mounts = texts(&compose["services"]["prometheus"]["volumes"]);
    let mounted = |file: &str| mounts.iter().any(|mount| mount.split(':').nth(1) == Some(file));
    let flags = texts(&compose["services"]["prometheus"]["command"]);
    let config = flags.iter().find_map(|flag| flag.strip_prefix("--config.file=")).unwrap();
    assert!(mounted(config) && mounted(&PathBuf::from(config).with_file_name("alerts.yml").display().to_string()));
    // Grafana's files lie where they look for each other, and the board's data source is the Prometheus beside it.
    let grafana = &compose["services"]["grafana"];
    assert!(texts(&grafana["volumes"]).contains(&"./config/grafana:/etc/grafana/provisioning:ro"));
    let provider = &YamlLoader::load_from_str(&read("config/grafana/dashboards/provider.yml")).unwrap()[0];
    let boards = provider["providers"][0]["options"]["path"].as_str().unwrap();
    let home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].as_str().unwrap();
    assert_eq!(home, format!("{boards}/rekindle.json"));
    assert_eq!(boards, "/etc/grafana/provisioning/dashboards");
    let sources = &YamlLoader::load_from_str(&read("config/grafana/datasources/prometheus.yml")).unwrap()[0];
    let source = &sources["datasources"][0];
    assert_eq!(source["uid"].as_str(), Some("prometheus"));
    let listens = flags.iter().find_map(|flag| flag.strip_prefix("--web.listen-address=")).unwrap();
    assert_eq!(source["url"].as_str(), Some(format!("http://{listens}").as_str()));
    assert!(!board().is_empty());
}

/// More series than these are not made by what is asked for the first time.
const NEW_SERIES: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_send_makes_few_series_and_no_label() {
    let _alone = machine().await;
    let home = Home::new();
    let server = Server::start(&home, &[]);
    let client = Client::of(&server.url);
    let before = client.metrics().await;
    let mut ids = Vec::new();
    for number in 0..30 {
        let id = client.conversation().await;
        if number < 3 {
            client.say(&id, "hello").await;
        }
        for path in [format!("/v1/conversations/conv_nosuch{number}/items"), format!("/nosuch/{number}")] {
            assert_eq!(client.get(&path).send().await.unwrap().status(), 404);
        }
        let body = json!({"model": format!("nosuch-{number}"), "messages": [{"role": "user", "content": "x"}]});
        assert_eq!(client.post("/v1/chat/completions", &body).send().await.unwrap().status(), 404);
        ids.push(id);
    }
    let after = client.metrics().await;
    let sent = |series: &&str| series.contains("nosuch") || ids.iter().any(|id| series.contains(id));
    assert_eq!(after.series().find(sent), None);
    let made = after.series().count() - before.series().count();
    assert!(made < NEW_SERIES, "{made} more series");
    server.finish().await;
}
