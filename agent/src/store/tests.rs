use super::*;
use crate::machine::hypervisor::MachineSpec;
use crate::machine::state::Committed;
use std::collections::BTreeMap;
use torpor_api::http::{ServiceAuth, ServiceKind, ServiceSpec, WakePolicy};
use torpor_api::{ExecutionId, LeaseAction, LeaseMode, LeasePolicy, MachineName};

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("torpor.db")).unwrap();
    (directory, store)
}

fn event(machine: &MachineId, kind: &'static str) -> NewEvent {
    NewEvent {
        at_unix_ms: 1000,
        machine: machine.clone(),
        execution: None,
        kind,
        actor: "api",
        detail: serde_json::json!({}),
    }
}

fn new_machine(name: Option<&str>) -> NewMachine {
    let id = MachineId::generate();
    NewMachine {
        activity: torpor_api::activity::ActivityPolicy::default(),
        retention_seconds: None,
        event: event(&id, "machine.created"),
        spec: MachineSpec {
            id,
            template: "base".to_owned(),
            template_digest: "d".to_owned(),
            vcpus: 2,
            mem_mib: 256,
            disk_mib: 1024,
        },
        name: name.map(|name| name.parse::<MachineName>().unwrap()),
        lease: Some(LeasePolicy {
            seconds: 60,
            action: LeaseAction::Pause,
            mode: LeaseMode::Sliding,
        }),
        wake: WakePolicy {
            ssh: false,
            ..WakePolicy::default()
        },
        services: vec![ServiceSpec {
            name: None,
            port: 80,
            kind: ServiceKind::Http,
            auth: ServiceAuth::None,
            wake_deadline_ms: None,
        }],
        metadata: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        env: BTreeMap::from([("E".to_owned(), "1".to_owned())]),
        cwd: Some("/srv".to_owned()),
        snapshot: None,
        hidden: false,
        idempotency: None,
    }
}

fn schema(sql: &str) -> BTreeMap<String, String> {
    let connection = Connection::open_in_memory().unwrap();
    connection.execute_batch(sql).unwrap();
    let mut statement = connection
        .prepare("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
        .unwrap();
    let rows = statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    rows.map(Result::unwrap).collect()
}

#[test]
fn the_sum_of_migrations_is_the_schema() {
    let mut connection = Connection::open_in_memory().unwrap();
    let migrations = Migrations::from_slice(MIGRATIONS);
    migrations.validate().unwrap();
    migrations.to_latest(&mut connection).unwrap();
    let mut statement = connection
        .prepare("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
        .unwrap();
    let migrated: BTreeMap<String, String> = statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(migrated, schema(include_str!("schema.sql")));
    assert!(
        migrated
            .values()
            .filter(|sql| sql.starts_with("CREATE TABLE"))
            .all(|sql| sql.contains("STRICT"))
    );
}

#[test]
fn a_store_of_a_newer_version_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("torpor.db");
    drop(Store::open(&path).unwrap());
    Connection::open(&path)
        .unwrap()
        .pragma_update(None, "user_version", 999)
        .unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Open { .. })));
    std::fs::write(
        &path,
        b"this is not a database, and is long enough to be looked at",
    )
    .unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Open { .. })));
}

#[tokio::test]
async fn a_row_comes_back_as_it_went_in() {
    let (_directory, store) = store();
    let new = new_machine(Some("web"));
    assert_eq!(store.create_machine(new.clone()).await.unwrap(), Created::New);
    let row = store.machine(&new.spec.id).await.unwrap().unwrap();
    assert_eq!(
        (&row.spec, &row.name, row.lease, row.wake),
        (&new.spec, &new.name, new.lease, new.wake)
    );
    assert_eq!(
        (&row.metadata, row.committed),
        (&new.metadata, Committed::Creating)
    );
    assert_eq!((&row.env, &row.cwd), (&new.env, &new.cwd));
    assert_eq!(row.services[0].listen_port, 20_000);
    assert_eq!(store.resolve("web").await.unwrap(), Some(new.spec.id.clone()));
    assert_eq!(
        store.resolve(new.spec.id.as_str()).await.unwrap(),
        Some(new.spec.id)
    );
    assert_eq!(store.resolve("we").await.unwrap(), None);
}

#[tokio::test]
async fn a_transition_of_another_generation_is_refused() {
    let (_directory, store) = store();
    let new = new_machine(None);
    let id = new.spec.id.clone();
    store.create_machine(new).await.unwrap();
    let mut running = Transition::new(0, Committed::Running, "api", 2000);
    running.execution = Some(ExecutionId::generate());
    running.lease = LeaseChange::Restart;
    let row = store.commit(id.clone(), running.clone()).await.unwrap();
    assert_eq!((row.generation, row.deadline_unix_ms), (1, Some(62_000)));
    assert!(matches!(
        store.commit(id.clone(), running).await,
        Err(StoreError::Superseded { generation: 0, .. })
    ));
    store.claim_due_leases(62_000, 92_000, 8).await.unwrap();
    let mut failed = Transition::new(1, Committed::Running, "lease", 62_001);
    failed.lease = LeaseChange::KeepOrStart;
    store.commit(id.clone(), failed).await.unwrap();
    assert_eq!(
        store.next_lease_check().await.unwrap(),
        Some(92_000),
        "a failed lease waits for its next look"
    );
    let mut paused = Transition::new(2, Committed::Paused, "lease", 63_000);
    paused.only_if_deadline_unix_ms = Some(61_999);
    assert!(matches!(
        store.commit(id.clone(), paused.clone()).await,
        Err(StoreError::LeaseMoved { .. })
    ));
    paused.only_if_deadline_unix_ms = Some(62_000);
    let row = store.commit(id, paused).await.unwrap();
    assert_eq!(
        (row.committed, row.deadline_unix_ms, row.execution),
        (Committed::Paused, None, None)
    );
}

#[tokio::test]
async fn names_and_keys_belong_to_one_machine() {
    let (_directory, store) = store();
    store.create_machine(new_machine(Some("a"))).await.unwrap();
    assert!(matches!(
        store.create_machine(new_machine(Some("a"))).await,
        Err(StoreError::NameTaken { .. })
    ));
    let mut keyed = new_machine(None);
    keyed.idempotency = Some(Idempotency {
        key: "k".to_owned(),
        body_digest: "1".to_owned(),
    });
    store.create_machine(keyed.clone()).await.unwrap();
    let mut again = new_machine(None);
    again.idempotency = keyed.idempotency.clone();
    assert_eq!(
        store.create_machine(again.clone()).await.unwrap(),
        Created::Before(keyed.spec.id.clone())
    );
    again.idempotency = Some(Idempotency {
        key: "k".to_owned(),
        body_digest: "2".to_owned(),
    });
    assert!(matches!(
        store.create_machine(again.clone()).await,
        Err(StoreError::KeyReused)
    ));
    store
        .remove_machine(keyed.spec.id.clone(), event(&keyed.spec.id, "machine.deleted"))
        .await
        .unwrap();
    assert_eq!(
        store.create_machine(again).await.unwrap(),
        Created::New,
        "a key ends with its machine"
    );
}

#[tokio::test]
async fn ports_are_not_given_again_at_once_and_gaps_are_used_at_the_end() {
    let (_directory, store) = store();
    let new = new_machine(None);
    let id = new.spec.id.clone();
    store.create_machine(new).await.unwrap();
    let spec = |port| ServiceSpec {
        name: None,
        port,
        kind: ServiceKind::Tcp,
        auth: ServiceAuth::None,
        wake_deadline_ms: None,
    };
    let second = store
        .expose(id.clone(), spec(81), event(&id, "service.exposed"))
        .await
        .unwrap();
    assert_eq!(second.listen_port, 20_001);
    store
        .unexpose(id.clone(), "port-80".to_owned(), event(&id, "service.removed"))
        .await
        .unwrap()
        .unwrap();
    let third = store
        .expose(id.clone(), spec(82), event(&id, "service.exposed"))
        .await
        .unwrap();
    assert_eq!(third.listen_port, 20_002);
    store
        .write("test", |tx| {
            tx.execute(
                "UPDATE services SET listen_port = 29999 WHERE listen_port = 20002",
                [],
            )
            .map_err(sql("test"))
        })
        .await
        .unwrap();
    for expected in [20_000, 20_002, 20_003] {
        let service = store
            .expose(id.clone(), spec(expected), event(&id, "service.exposed"))
            .await
            .unwrap();
        assert_eq!(service.listen_port, expected);
    }
    let again = store
        .expose(id.clone(), spec(81), event(&id, "service.exposed"))
        .await
        .unwrap();
    assert_eq!(again, second, "exposing twice changes nothing");
}

#[tokio::test]
async fn lists_and_events_are_paged_in_order() {
    let (_directory, store) = store();
    let mut ids = Vec::new();
    for _ in 0..5 {
        let new = new_machine(None);
        ids.push(new.spec.id.clone());
        store.create_machine(new).await.unwrap();
    }
    let page = store
        .list(MachineFilter::default(), Some(ids[1].clone()), 2)
        .await
        .unwrap();
    assert_eq!(
        page.iter().map(|row| row.spec.id.clone()).collect::<Vec<_>>(),
        ids[2..4]
    );
    assert!(matches!(
        store
            .list(MachineFilter::default(), Some(MachineId::generate()), 2)
            .await,
        Err(StoreError::NoMachine { .. })
    ));
    let filter = |machine, after| EventFilter {
        machine,
        after,
        limit: 100,
    };
    assert_eq!(store.events(filter(None, 0)).await.unwrap().len(), 5);
    assert_eq!(store.events(filter(None, 3)).await.unwrap()[0].offset, 4);
    assert_eq!(store.events(filter(None, u64::MAX)).await.unwrap(), []);
    let of_one = store.events(filter(Some(ids[2].clone()), 0)).await.unwrap();
    assert_eq!(of_one.iter().map(|event| event.offset).collect::<Vec<_>>(), [3]);
}

/// Deadlines of a hundred thousand paused machines are no deadlines, and nobody reads their rows.
#[tokio::test]
async fn a_hundred_thousand_paused_rows_cost_nothing_at_the_start() {
    let (directory, store) = store();
    let first = new_machine(None);
    store.create_machine(first.clone()).await.unwrap();
    store
        .write("fill", |tx| {
            tx.execute_batch(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) \
                 INSERT INTO machines (id, template, template_digest, vcpus, mem_mib, disk_mib, state, wake_http, \
                 wake_ssh, wake_tcp, wake_api, metadata, created_unix_ms, last_used_unix_ms) \
                 SELECT 'mch_' || substr(hex(randomblob(16)), 1, 20), 'base', 'd', 1, 256, 512, 'paused', 1, 1, 1, 1, \
                 '{}', i, i FROM n;",
            )
            .map_err(sql("fill"))
        })
        .await
        .unwrap();
    drop(store);
    let store = Store::open(&directory.path().join("torpor.db")).unwrap();
    assert_eq!(store.unsettled().await.unwrap().len(), 1);
    assert_eq!(store.next_lease_check().await.unwrap(), None);
    assert_eq!(store.counts().await.unwrap()["paused"], 100_000);
    let plans = store
        .read("explain", |tx| {
            let mut plans = Vec::new();
            for query in [
                "SELECT id FROM machines WHERE state IN ('creating', 'running', 'deleting') ORDER BY seq",
                "SELECT min(lease_check_unix_ms) FROM machines WHERE lease_check_unix_ms IS NOT NULL",
                "SELECT id FROM machines WHERE lease_check_unix_ms <= 5 ORDER BY lease_check_unix_ms LIMIT 64",
            ] {
                let mut statement = tx.prepare(&format!("EXPLAIN QUERY PLAN {query}")).map_err(sql("explain"))?;
                let plan = statement.query_map([], |row| row.get::<_, String>(3)).map_err(sql("explain"))?;
                plans.push(plan.map(Result::unwrap).collect::<Vec<_>>().join("; "));
            }
            Ok(plans)
        })
        .await
        .unwrap();
    for plan in plans {
        assert!(
            plan.contains("USING") && plan.contains("INDEX"),
            "a query reads every row: {plan}"
        );
    }
}

#[tokio::test]
async fn lists_show_machines_with_all_of_the_wanted_metadata() {
    let (_directory, store) = store();
    let mut ids = Vec::new();
    for text in [
        r#"{"k":"v","team":"a"}"#,
        r#"{"k":"v"}"#,
        r#"{"k":"w","team":"a"}"#,
    ] {
        let mut new = new_machine(None);
        new.metadata = serde_json::from_str(text).unwrap();
        ids.push(new.spec.id.clone());
        store.create_machine(new).await.unwrap();
    }
    for (template, wanted, found) in [
        (None, "{}", vec![0, 1, 2]),
        (None, r#"{"k":"v"}"#, vec![0, 1]),
        (None, r#"{"k":"v","team":"a"}"#, vec![0]),
        (None, r#"{"K":"v"}"#, vec![]),
        (Some("base"), "{}", vec![0, 1, 2]),
        (Some("other"), "{}", vec![]),
    ] {
        let filter = MachineFilter {
            template: template.map(str::to_owned),
            metadata: serde_json::from_str(wanted).unwrap(),
        };
        let rows = store.list(filter, None, 10).await.unwrap();
        let shown: Vec<_> = rows.into_iter().map(|row| row.spec.id).collect();
        let expected: Vec<_> = found.into_iter().map(|index: usize| ids[index].clone()).collect();
        assert_eq!(shown, expected, "{template:?} {wanted}");
    }
    let empty = BTreeMap::new();
    store
        .set_metadata(ids[0].clone(), empty, event(&ids[0], "machine.metadata_set"))
        .await
        .unwrap();
    assert!(store.machine(&ids[0]).await.unwrap().unwrap().metadata.is_empty());
}

#[tokio::test]
async fn a_machine_answers_to_its_ids_in_other_apis_and_remembers_its_last_execution() {
    let (_directory, store) = store();
    let new = new_machine(Some("web"));
    let id = new.spec.id.clone();
    store.create_machine(new).await.unwrap();
    let execution = ExecutionId::generate();
    let mut step = Transition::new(0, Committed::Running, "api", 1);
    step.execution = Some(execution.clone());
    store.commit(id.clone(), step).await.unwrap();
    let row = store
        .commit(id.clone(), Transition::new(1, Committed::Paused, "api", 2))
        .await
        .unwrap();
    assert_eq!(
        (row.execution, row.last_execution.as_ref()),
        (None, Some(&execution))
    );
    let machine = id.as_str().trim_start_matches("mch_");
    let run = execution.as_str().trim_start_matches("exe_");
    for text in [
        format!("morphvm_{machine}"),
        format!("mch_{run}"),
        format!("snap_{run}"),
        id.to_string(),
        execution.to_string(),
        "web".to_owned(),
    ] {
        assert_eq!(store.resolve(&text).await.unwrap(), Some(id.clone()), "{text}");
    }
    for text in [
        format!("morphvm_{run}"),
        format!("snap_{machine}"),
        "morphvm_".to_owned(),
    ] {
        assert_eq!(store.resolve(&text).await.unwrap(), None, "{text}");
    }
}
