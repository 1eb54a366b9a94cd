//! A link: a ring, a credit window and a name.
//!
//! Messages go one way, credits the other. A message costs the sender one credit; the receiver
//! gives it back when it is done with the message, not when it has read it: so the window bounds
//! what the receiver *holds*, and its pace is the sender's pace.
//!
//! ```text
//!            free            in flight           held
//! Sender ───(credit)──►  ring of `capacity`  ──►  Receiver
//!    ▲                                               │
//!    └───────────────── returning ◄──────────────────┘      sum of the four = capacity (I1)
//! ```
//!
//! The ring has as many slots as the window has credits, and a credit comes back only after its
//! message has left the ring: a send that holds a credit never finds the ring full (I2).

use std::error::Error;
use std::fmt;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crossbeam_utils::CachePadded;

use super::credit::{CreditReturn, CreditWindow};
use crate::ring::sync::{Arc, AtomicUsize};
use crate::ring::{Consumer, Doorbell, Producer, PushError, ring};

/// Set in [`Return`]'s word by a sender that has no credit and wants to be rung when it gets one.
const STARVED: usize = 1 << (usize::BITS - 1);

/// Makes a link with room for `capacity` messages. A send rings `to_receiver`; a credit that
/// comes back to a sender that has none rings `to_sender`. Each also rings when the other end
/// is dropped.
///
/// # Panics
/// When `capacity` is no ring's (see [`ring`]).
pub fn link<T: Send>(
    name: &'static str,
    capacity: usize,
    to_receiver: Arc<Doorbell>,
    to_sender: Arc<Doorbell>,
) -> (Sender<T>, Receiver<T>) {
    let (producer, consumer) = ring(capacity);
    let returning = Arc::new(CachePadded::new(AtomicUsize::new(0)));
    let sender = Sender {
        name,
        producer,
        window: CreditWindow::full(capacity),
        returning: Arc::clone(&returning),
        to_receiver: RingOnDrop(to_receiver),
    };
    let receiver = Receiver {
        name,
        consumer,
        held: 0,
        due: CreditReturn::new(capacity),
        returning,
        to_sender: RingOnDrop(to_sender),
    };
    (sender, receiver)
}

/// Tells the other end that this one is gone. Stands behind the ring's half in its struct: fields
/// are dropped in order, so the one who is woken finds the ring abandoned.
#[derive(Debug)]
struct RingOnDrop(Arc<Doorbell>);

impl Drop for RingOnDrop {
    fn drop(&mut self) {
        self.0.ring();
    }
}

/// The end that sends.
#[derive(Debug)]
pub struct Sender<T> {
    name: &'static str,
    producer: Producer<T>,
    /// This side's credits. Outstanding = in flight + held + returning.
    window: CreditWindow,
    /// Credits on their way back, and [`STARVED`]. The receiver adds, this side takes all.
    returning: Arc<CachePadded<AtomicUsize>>,
    to_receiver: RingOnDrop,
}

impl<T> Sender<T> {
    /// How many messages may be sent now. When the answer is 0, the sender's bell will ring as
    /// soon as that changes.
    #[inline]
    pub fn credits(&mut self) -> usize {
        self.collect();
        self.window.available()
    }

    /// Sends a message, or hands it back: for want of credit (the sender's bell will ring), or
    /// because the receiver is gone.
    #[inline]
    pub fn send(&mut self, message: T) -> Result<(), SendError<T>> {
        if self.window.available() == 0 && self.credits() == 0 {
            return Err(if self.is_abandoned() {
                SendError::Gone(message)
            } else {
                SendError::NoCredit(message)
            });
        }
        match self.producer.push(message) {
            Ok(()) => {}
            Err(PushError::Abandoned(message)) => return Err(SendError::Gone(message)),
            Err(PushError::Full(_)) => self.full_in_spite_of_credit(),
        }
        let taken = self.window.take(1);
        debug_assert!(taken, "a credit was there a moment ago");
        self.to_receiver.0.ring();
        Ok(())
    }

    /// Sends what `messages` yields until that ends or the credits do, shows it all at once and
    /// rings once. Returns how many; what was not sent was not taken from the iterator.
    pub fn send_batch(&mut self, messages: &mut impl Iterator<Item = T>) -> usize {
        let credits = self.credits();
        let mut granted = messages.take(credits);
        let sent = self.producer.push_batch(&mut granted);
        let taken = self.window.take(sent);
        assert!(taken, "link {}: {sent} messages sent on {credits} credits", self.name);
        if sent > 0 {
            self.to_receiver.0.ring();
        }
        sent
    }

    /// Whether the receiver is gone.
    pub fn is_abandoned(&self) -> bool {
        self.producer.is_abandoned()
    }

    /// The link's name, as in metrics and errors.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How many messages the link has room for.
    pub fn capacity(&self) -> usize {
        self.window.capacity()
    }

    /// Takes in the credits that came back. Leaves the [`STARVED`] mark if there are none at all.
    fn collect(&mut self) {
        loop {
            if self.returning.load(Relaxed) & !STARVED != 0 {
                // Acquire pairs with the receiver's Release in `give_now`: what it did before,
                // popping above all, is visible. That is what I2 rests on.
                let returned = self.returning.swap(0, Acquire) & !STARVED;
                let given = self.window.give(returned);
                assert!(given.is_ok(), "link {}: {given:?}", self.name);
            }
            if self.window.available() > 0 {
                return;
            }
            // Relaxed is enough: the mark carries nothing. The receiver's addition either comes
            // before, then this fails and there is something to collect, or after, then it sees
            // the mark.
            let marked = self.returning.compare_exchange(0, STARVED, Relaxed, Relaxed);
            if !matches!(marked, Err(now) if now & !STARVED != 0) {
                return;
            }
        }
    }

    #[cold]
    fn full_in_spite_of_credit(&self) -> ! {
        panic!("link {}: the ring is full and there is credit (I2): {:?}", self.name, self.window)
    }
}

/// The end that receives.
#[derive(Debug)]
pub struct Receiver<T> {
    name: &'static str,
    consumer: Consumer<T>,
    /// Messages received whose credit was not given back. Range: 0 ..= capacity.
    held: usize,
    /// Credits given back and not yet on their way.
    due: CreditReturn,
    /// See [`Sender::returning`](Sender).
    returning: Arc<CachePadded<AtomicUsize>>,
    to_sender: RingOnDrop,
}

impl<T> Receiver<T> {
    /// The oldest message. It counts as held until [`Receiver::give_back`].
    #[inline]
    pub fn receive(&mut self) -> Option<T> {
        let message = self.consumer.pop();
        if message.is_some() {
            self.held += 1;
        } else {
            // Run dry: whatever is due may be all that the sender waits for.
            self.flush();
        }
        message
    }

    /// Gives back the credits of `n` held messages. They travel in batches of half a window, or
    /// when the receiver finds nothing to receive.
    ///
    /// # Panics
    /// When fewer are held: the receiver's account is wrong.
    #[inline]
    pub fn give_back(&mut self, n: usize) {
        assert!(n <= self.held, "link {}: {n} given back of {} held", self.name, self.held);
        self.held -= n;
        let due = self.due.gather(n);
        self.give_now(due);
    }

    /// Sends credits that were given back on their way now.
    pub fn flush(&mut self) {
        let due = self.due.flush();
        self.give_now(due);
    }

    #[inline]
    fn give_now(&mut self, credits: usize) {
        if credits == 0 {
            return;
        }
        // Release pairs with the sender's Acquire in `collect`: the messages have left the ring.
        let old = self.returning.fetch_add(credits, Release);
        if old & STARVED != 0 {
            self.to_sender.0.ring();
        }
    }

    /// How many messages wait to be received.
    pub fn len(&mut self) -> usize {
        self.consumer.len()
    }

    /// Whether nothing waits to be received.
    pub fn is_empty(&mut self) -> bool {
        self.consumer.is_empty()
    }

    /// How many messages were received and not given back.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether the sender is gone. What it sent can still be received.
    pub fn is_abandoned(&self) -> bool {
        self.consumer.is_abandoned()
    }

    /// The link's name, as in metrics and errors.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How many messages the link has room for.
    pub fn capacity(&self) -> usize {
        self.consumer.capacity()
    }
}

/// Where a link's credits are, each part counted where it lies. Meant for one thread that has both
/// ends in hand, as the simulator and tests do; between running cores the parts would be of
/// different moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// The link's.
    pub name: &'static str,
    /// How many there must be.
    pub capacity: usize,
    /// With the sender.
    pub free: usize,
    /// Each with a message in the ring.
    pub in_flight: usize,
    /// Each with a message that the receiver has not given back.
    pub held: usize,
    /// Given back, and not yet with the sender.
    pub returning: usize,
}

impl Census {
    /// Counts the credits of a link.
    pub fn of<T>(sender: &mut Sender<T>, receiver: &mut Receiver<T>) -> Census {
        assert!(Arc::ptr_eq(&sender.returning, &receiver.returning), "ends of two links");
        let on_the_way = sender.returning.load(Acquire) & !STARVED;
        Census {
            name: sender.name,
            capacity: sender.capacity(),
            free: sender.window.available(),
            in_flight: receiver.len(),
            held: receiver.held,
            returning: on_the_way + receiver.due.gathered(),
        }
    }

    /// Whether every credit is accounted for (I1).
    pub fn balances(&self) -> bool {
        self.free + self.in_flight + self.held + self.returning == self.capacity
    }
}

/// Why a message was not sent. It comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum SendError<T> {
    /// The receiver has as much as it can hold. The sender's bell rings when that changes.
    NoCredit(T),
    /// The receiver is gone.
    Gone(T),
}

impl<T> SendError<T> {
    /// The message that was not sent.
    pub fn into_message(self) -> T {
        match self {
            SendError::NoCredit(message) | SendError::Gone(message) => message,
        }
    }
}

impl<T> fmt::Debug for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SendError::NoCredit(_) => "NoCredit(..)",
            SendError::Gone(_) => "Gone(..)",
        })
    }
}

impl<T> fmt::Display for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SendError::NoCredit(_) => "the link has no credit left",
            SendError::Gone(_) => "the link's receiver is gone",
        })
    }
}

impl<T> Error for SendError<T> {}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    struct Link {
        sender: Sender<u32>,
        receiver: Receiver<u32>,
        to_receiver: Arc<Doorbell>,
        to_sender: Arc<Doorbell>,
    }

    fn make(capacity: usize) -> Link {
        let (to_receiver, to_sender) = (Doorbell::new(), Doorbell::new());
        let (sender, receiver) = link("test", capacity, to_receiver.clone(), to_sender.clone());
        Link { sender, receiver, to_receiver, to_sender }
    }

    fn was_rung(bell: &Doorbell) -> bool {
        bell.poll_rung(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn a_message_costs_a_credit_until_the_receiver_is_done_with_it() {
        let Link { mut sender, mut receiver, .. } = make(2);
        assert_eq!(sender.send(1), Ok(()));
        assert_eq!(sender.send(2), Ok(()));
        assert_eq!(sender.send(3), Err(SendError::NoCredit(3)));
        assert_eq!(receiver.receive(), Some(1));
        assert_eq!(sender.send(3), Err(SendError::NoCredit(3)), "received is not given back");
        receiver.give_back(1);
        assert_eq!(sender.send(3), Ok(()));
        assert_eq!(receiver.held(), 0);
    }

    #[test]
    fn credits_come_back_by_half_windows_or_when_the_receiver_runs_dry() {
        let Link { mut sender, mut receiver, .. } = make(8);
        assert_eq!(sender.send_batch(&mut (0..5)), 5);
        for _ in 0..3 {
            receiver.receive().unwrap();
            receiver.give_back(1);
        }
        assert_eq!(sender.credits(), 3, "three of a window of eight are not worth a trip");
        receiver.receive().unwrap();
        receiver.give_back(1);
        assert_eq!(sender.credits(), 7);
        receiver.receive().unwrap();
        receiver.give_back(1);
        assert_eq!(sender.credits(), 7);
        assert_eq!(receiver.receive(), None);
        assert_eq!(sender.credits(), 8);
    }

    #[test]
    fn the_senders_bell_rings_only_when_it_had_found_no_credit() {
        let Link { mut sender, mut receiver, to_sender, .. } = make(2);
        assert_eq!(sender.send_batch(&mut (0..9)), 2);
        receiver.receive();
        receiver.give_back(1);
        assert!(!was_rung(&to_sender), "it has not asked yet");
        assert_eq!(sender.credits(), 1);
        sender.send(9).unwrap();
        assert_eq!(sender.credits(), 0);
        receiver.receive();
        receiver.give_back(1);
        assert!(was_rung(&to_sender));
        assert_eq!(sender.credits(), 1);
    }

    #[test]
    fn a_send_rings_the_receiver_and_an_empty_batch_does_not() {
        let Link { mut sender, receiver: _receiver, to_receiver, .. } = make(2);
        assert_eq!(sender.send_batch(&mut std::iter::empty()), 0);
        assert!(!was_rung(&to_receiver));
        sender.send(1).unwrap();
        assert!(was_rung(&to_receiver));
    }

    #[test]
    fn each_end_learns_that_the_other_is_gone() {
        let Link { mut sender, receiver, to_sender, .. } = make(1);
        drop(receiver);
        assert!(was_rung(&to_sender));
        assert_eq!(sender.send(1), Err(SendError::Gone(1)));

        let Link { mut sender, mut receiver, to_receiver, .. } = make(1);
        sender.send(1).unwrap();
        assert!(was_rung(&to_receiver));
        drop(sender);
        assert!(was_rung(&to_receiver));
        assert!(receiver.is_abandoned());
        assert_eq!(receiver.receive(), Some(1));
    }

    #[test]
    fn a_sender_without_credit_is_told_of_a_receiver_that_is_gone() {
        let Link { mut sender, receiver, .. } = make(1);
        sender.send(1).unwrap();
        assert_eq!(sender.send(2), Err(SendError::NoCredit(2)));
        drop(receiver);
        assert_eq!(sender.send(2), Err(SendError::Gone(2)));
    }

    #[test]
    #[should_panic(expected = "1 given back of 0 held")]
    fn giving_back_what_is_not_held_is_refused() {
        let Link { mut receiver, .. } = make(1);
        receiver.give_back(1);
    }
}
