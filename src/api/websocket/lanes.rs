//! In which order do the creates of a socket run?
//!
//! Those with one `stream_id` run one after another, others beside them; no `stream_id` is a lane too. A conversation's own
//! order is `sessions`' affair, across lanes and sockets.
#![cfg_attr(not(test), deny(clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::cell::Cell;
use std::collections::HashMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;

use actix_web::rt;
use futures_util::FutureExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// The name of a lane; `None` for creates without `stream_id`.
pub type Name = Option<String>;

/// How much may run and wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub lanes: usize,
    /// Creates that wait behind the one that runs, in each lane.
    pub depth: usize,
}

/// Why a create was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    Lanes,
    Depth,
}

struct Lane<T> {
    creates: mpsc::Sender<T>,
    /// Creates that run or wait: what bounds the queue.
    pending: Rc<Cell<usize>>,
    task: JoinHandle<()>,
}

/// The lanes of one socket. Dropping them ends what they run.
pub struct Lanes<T> {
    bounds: Bounds,
    lanes: HashMap<Name, Lane<T>>,
    /// Creates that run or wait.
    busy: watch::Sender<usize>,
    /// Whether a create panicked.
    broken: Rc<Cell<bool>>,
}

impl<T: 'static> Lanes<T> {
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, lanes: HashMap::new(), busy: watch::Sender::new(0), broken: Rc::default() }
    }

    /// Runs the create when its lane's turn has come.
    pub fn submit<F, R>(&mut self, name: &Name, create: T, run: &Rc<F>) -> Result<(), Full>
    where
        F: Fn(Name, T) -> R + 'static,
        R: Future<Output = ()> + 'static,
    {
        if !self.lanes.contains_key(name) {
            if self.lanes.len() >= self.bounds.lanes {
                self.lanes.retain(|_, lane| lane.pending.get() > 0);
            }
            if self.lanes.len() >= self.bounds.lanes {
                return Err(Full::Lanes);
            }
            let lane = self.open(name.clone(), run);
            self.lanes.insert(name.clone(), lane);
        }
        let Some(lane) = self.lanes.get(name) else { return Err(Full::Lanes) };
        if lane.pending.get() > self.bounds.depth || lane.creates.try_send(create).is_err() {
            return Err(Full::Depth);
        }
        lane.pending.set(lane.pending.get() + 1);
        self.busy.send_modify(|busy| *busy += 1);
        Ok(())
    }

    fn open<F, R>(&self, name: Name, run: &Rc<F>) -> Lane<T>
    where
        F: Fn(Name, T) -> R + 'static,
        R: Future<Output = ()> + 'static,
    {
        let (creates, mut waiting) = mpsc::channel::<T>(self.bounds.depth + 1);
        let pending = Rc::new(Cell::new(0));
        let (run, busy, left) = (Rc::clone(run), self.busy.clone(), Rc::clone(&pending));
        let broken = Rc::clone(&self.broken);
        let task = rt::spawn(async move {
            while let Some(create) = waiting.recv().await {
                let run = AssertUnwindSafe(run(name.clone(), create)).catch_unwind();
                broken.set(run.await.is_err() || broken.get());
                left.set(left.get() - 1);
                busy.send_modify(|busy| *busy -= 1);
            }
        });
        Lane { creates, pending, task }
    }

    /// Whether a create panicked: nobody will hear the end of it.
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Whether nothing runs or waits.
    pub fn is_idle(&self) -> bool {
        *self.busy.borrow() == 0
    }

    /// Changes whenever something begins or ends.
    pub fn activity(&self) -> watch::Receiver<usize> {
        self.busy.subscribe()
    }
}

impl<T> Drop for Lanes<T> {
    fn drop(&mut self) {
        for lane in self.lanes.values() {
            lane.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use tokio::sync::Semaphore;

    use super::*;

    /// Lanes whose creates wait for a permit each and then note that they ran.
    struct World {
        lanes: Lanes<u32>,
        ran: Rc<RefCell<Vec<(Name, u32)>>>,
        permits: Rc<Semaphore>,
    }

    impl World {
        fn new() -> Self {
            let lanes = Lanes::new(Bounds { lanes: 2, depth: 2 });
            Self { lanes, ran: Rc::default(), permits: Rc::new(Semaphore::new(0)) }
        }

        fn submit(&mut self, lane: &str, create: u32) -> Result<(), Full> {
            let (ran, permits) = (Rc::clone(&self.ran), Rc::clone(&self.permits));
            let run = Rc::new(move |name, create| {
                let (ran, permits) = (Rc::clone(&ran), Rc::clone(&permits));
                async move {
                    permits.acquire().await.unwrap().forget();
                    ran.borrow_mut().push((name, create));
                }
            });
            self.lanes.submit(&Some(lane.to_owned()), create, &run)
        }

        async fn settle(&self) {
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        }
    }

    #[actix_web::test]
    async fn a_lane_runs_in_order_and_lanes_run_beside_each_other() {
        let mut world = World::new();
        for create in [1, 2, 3] {
            world.submit("a", create).unwrap();
        }
        world.submit("b", 9).unwrap();
        world.settle().await;
        world.permits.add_permits(4);
        world.settle().await;
        let ran = world.ran.borrow();
        let of = |lane: &str| -> Vec<u32> {
            ran.iter().filter(|(name, _)| name.as_deref() == Some(lane)).map(|(_, id)| *id).collect()
        };
        assert_eq!((of("a"), of("b")), (vec![1, 2, 3], vec![9]));
        assert!(world.lanes.is_idle());
    }

    #[actix_web::test]
    async fn a_full_lane_and_too_many_lanes_are_refused_and_an_idle_lane_makes_room() {
        let mut world = World::new();
        for create in [1, 2, 3] {
            world.submit("a", create).unwrap();
            world.settle().await;
        }
        assert_eq!(world.submit("a", 4), Err(Full::Depth), "one runs and two wait");
        world.submit("b", 5).unwrap();
        assert_eq!(world.submit("c", 6), Err(Full::Lanes));
        world.settle().await;
        world.permits.add_permits(4);
        world.settle().await;
        world.submit("c", 6).unwrap();
    }

    #[actix_web::test]
    async fn a_panic_is_noticed_and_the_lane_goes_on() {
        let mut lanes = Lanes::new(Bounds { lanes: 1, depth: 1 });
        let run = Rc::new(|_, create: u32| async move { assert_ne!(create, 1, "a panic of the test") });
        lanes.submit(&None, 1, &run).unwrap();
        lanes.submit(&None, 2, &run).unwrap();
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        assert!(lanes.is_broken() && lanes.is_idle());
    }

    #[actix_web::test]
    async fn lanes_that_are_dropped_run_no_more() {
        let mut world = World::new();
        world.submit("a", 1).unwrap();
        world.settle().await;
        let (ran, permits) = (Rc::clone(&world.ran), Rc::clone(&world.permits));
        drop(world);
        tokio::task::yield_now().await;
        permits.add_permits(1);
        tokio::task::yield_now().await;
        assert!(ran.borrow().is_empty());
    }
}
