//! A guest that takes its time to answer.

use super::*;
use crate::machine::clock::Clock;
use crate::machine::{leases, usage};
use std::time::Duration;
use tokio::sync::Semaphore;

/// A server in the guest that answers every request when it gets leave.
async fn slow_server(leave: Arc<Semaphore>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let leave = Arc::clone(&leave);
            tokio::spawn(async move {
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                leave.acquire().await.unwrap().forget();
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\nslow";
                let _ = stream.write_all(answer).await;
            });
        }
    });
    address
}

/// So many seconds pass, and whoever waits for one of them gets to its end.
async fn pass(world: &World, seconds: u64) {
    for _ in 0..seconds {
        let next = world.clock.now_unix_ms() + 1000;
        world.clock.sleeper_at(next).await;
        world.clock.advance(Duration::from_secs(1));
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_machine_that_works_on_an_answer_does_not_fall_asleep_over_it() {
    let world = World::new();
    tokio::spawn(leases::run(world.fleet.clone()));
    tokio::spawn(usage::run(world.fleet.clone()));
    let (id, port, _proxy) = served(&world).await;
    let leave = Arc::new(Semaphore::new(0));
    world.host.serve(80, slow_server(Arc::clone(&leave)).await);
    let lease = json!({ "seconds": 60, "action": "pause", "mode": "sliding" });
    let lease = serde_json::from_value(lease).unwrap();
    let rule = PolicyRule::DestroyOrWake;
    world.fleet.set_lease(&id, Some(lease), rule).await.unwrap();
    let request = tokio::spawn(get(port));
    pass(&world, 200).await;
    assert_eq!(world.status(&id).await, MachineStatus::Running);
    leave.add_permits(1);
    let answer = request.await.unwrap();
    assert!(answer.ends_with("slow"), "{answer}");
    pass(&world, 90).await;
    world.reaches(&id, MachineStatus::Paused).await;
}
