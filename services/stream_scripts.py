"""The atomic steps of `services.streams`, as Redis runs them (EVALSHA)."""

# Every script touches only keys passed in KEYS, so that it also runs on a Redis Cluster.
FEED = """
-- KEYS ledger, prompts, dead; ARGV expected_fed, max_in_flight, payload...
local fed = tonumber(redis.call('HGET', KEYS[1], 'fed') or '0')
if fed ~= tonumber(ARGV[1]) then return {0, fed} end
local consumed = tonumber(redis.call('HGET', KEYS[1], 'consumed') or '0')
local room = tonumber(ARGV[2]) - (fed - consumed - redis.call('XLEN', KEYS[3]))
local count = math.max(0, math.min(room, #ARGV - 2))
for i = 1, count do redis.call('XADD', KEYS[2], '*', 'item', ARGV[2 + i]) end
return {count, redis.call('HINCRBY', KEYS[1], 'fed', count)}
"""
HAND_OFF = """
-- KEYS in, out, failures; ARGV group, (id, payload)...  Returns 1 for each that was still ours.
local moved = {}
for i = 2, #ARGV, 2 do
  local ours = redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
  if ours == 1 then
    redis.call('XADD', KEYS[2], '*', 'item', ARGV[i + 1])
    redis.call('XDEL', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[3], ARGV[i])
  end
  moved[#moved + 1] = ours
end
return moved
"""
BURY = """
-- KEYS in, dead, failures; ARGV group, id, stream, reason, detail
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])
redis.call('XADD', KEYS[2], '*', 'stream', ARGV[3], 'reason', ARGV[4], 'detail', ARGV[5],
           'item', entry[1][2][2])
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
return 1
"""
REQUEUE = """
-- KEYS dead, out; ARGV id
local entry = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])
if #entry == 0 then return 0 end
local fields = entry[1][2]
for i = 1, #fields, 2 do
  if fields[i] == 'item' then redis.call('XADD', KEYS[2], '*', 'item', fields[i + 1]) end
end
return redis.call('XDEL', KEYS[1], ARGV[1])
"""
SETTLE = """
-- KEYS in, ledger; ARGV group, id...
local settled = 0
for i = 2, #ARGV do
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
    redis.call('XDEL', KEYS[1], ARGV[i])
    settled = settled + 1
  end
end
redis.call('HINCRBY', KEYS[2], 'trained', settled)
return settled
"""
RENEW = """
-- KEYS in; ARGV group, consumer, id...  Only what is still ours: XCLAIM alone would steal back.
local held = {}
for i = 3, #ARGV do
  local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #mine == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    held[#held + 1] = ARGV[i]
  end
end
return held
"""
RELEASE = """
-- KEYS in, failures; ARGV group, consumer, id, idle_ms, detail
local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if #mine == 0 then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'JUSTID')
redis.call('HSET', KEYS[2], ARGV[3], ARGV[5])
return 1
"""
ABANDON = """
-- KEYS in; ARGV group, consumer, idle_ms, nobody
-- Gives all that a dead consumer held to nobody, free to be taken over, and forgets it.
local held = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000000, ARGV[2])
for _, entry in ipairs(held) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, entry[1], 'IDLE', ARGV[3], 'JUSTID')
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return #held
"""
TAKE_OVER = """
-- KEYS in, failures; ARGV group, consumer, min_idle_ms, cursor, count
local found = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4],
                         'COUNT', ARGV[5])
local taken = {}
for _, entry in ipairs(found[2]) do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
  taken[#taken + 1] = {entry[1], entry[2][2], pending[1][4],
                       redis.call('HGET', KEYS[2], entry[1]) or ''}
end
return {found[1], taken}
"""
RESTORE = """
-- KEYS ledger, prompts; ARGV fed, trained, payload...
redis.call('HSET', KEYS[1], 'fed', ARGV[1], 'trained', ARGV[2], 'consumed', ARGV[2])
for i = 3, #ARGV do redis.call('XADD', KEYS[2], '*', 'item', ARGV[i]) end
return #ARGV - 2
"""
DISCARD = """
-- KEYS in; ARGV group, id
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
return redis.call('XDEL', KEYS[1], ARGV[2])
"""
