use crate::tunnel::{records::Opened, testing::pair};

#[test]
fn data_goes_both_ways() {
    let (mut client, mut server) = pair();
    for round in 0..300 {
        let text = format!("request {round}");
        let mut wire = client.seal(text.as_bytes()).unwrap();
        let (opened, length) = server.open(&mut wire).unwrap().unwrap();
        let Opened::Data(range) = opened else { panic!("{opened:?}") };
        assert_eq!((&wire[range], length), (text.as_bytes(), wire.len()));

        let mut wire = server.seal(b"answer").unwrap();
        let (opened, length) = client.open(&mut wire).unwrap().unwrap();
        let Opened::Data(range) = opened else { panic!("{opened:?}") };
        assert_eq!((&wire[range], length), (b"answer".as_slice(), wire.len()));
    }
}
